"""Fake quantisation: what a stored page would decode to, in plain PyTorch.

Every function returns tensors in the caller's domain (post-RoPE, unrotated), so that a score is
simply `q . k_index` and a logit `q . k_hat`. Scales and means are rounded as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from selfindex.codec.balance import LIMIT, measure_balance
from selfindex.codec.scales import decode_scales, encode_scales
from selfindex.evaluation.baselines.quantised import LEVELS, minmax, random_rotation

from .trellis import trellis_levels

MEAN_ABS = 0.7978845608  # E|x| of a unit Gaussian
SEARCHED = (0.88, 1.12)  # multiples of the root mean square


@dataclass(frozen=True)
class KeySpec:
    """How keys are stored. `page=None` is one (float) mean for the whole prefix."""

    page: int | None = 256
    centre: bool = True
    int8_mean: bool = True
    rotate: bool = True
    balance: str = "prompt"  # a key of `balance_vectors`, or "none"
    bits: int = 3
    token_scale: bool = True  # the index multiplies each token's score by its scale
    constant: float = MEAN_ABS  # score constant a
    exact: bool = False  # decode to the exact keys (to isolate the selection)
    fit: str = "mse"  # scale of a token, as in `lloyd`
    search: bool = False  # levels of the least angle, as in `lloyd`
    own_scale: bool = False  # the index has a scale of its own, the mean magnitude of the token
    rotary: bool = False  # besides the page's, subtract a mean before RoPE, turned to the token's place
    shaped: bool = False  # round so that errors are small where queries are large (GPTQ)
    states: int = 0  # magnitudes by a trellis of so many states (trellis.py); 0: each by itself


@dataclass(frozen=True)
class ValueSpec:
    """How values are stored. `group=0` is one scale per token."""

    bits: int = 2
    kind: str = "lloyd"  # "lloyd", "uniform" (min/max clipped), or "exact"
    group: int = 32
    fit: str = "unbiased"  # scale of a group, as in `lloyd`
    search: bool = False
    clip: float = 0.85
    rotate: bool = True
    centre: bool = False  # store against the page's int8 mean
    page: int = 256
    states: int = 0  # levels by a trellis of so many states (trellis.py); 0: each by itself


def to_pages(x: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """[H, n, d] -> ([H, pages, page, d] padded with zeros, [pages, page] validity)."""
    heads, n, d = x.shape
    count = -(-n // page)
    out = x.new_zeros(heads, count * page, d)
    out[:, :n] = x
    valid = torch.arange(count * page) < n
    return out.view(heads, count, page, d), valid.view(count, page)


def round_e4m4(scale: Tensor, page: int) -> Tensor:
    """Round positive scales [H, n, groups] to bits 6..13 of a half, times a base per page."""
    pages, _ = to_pages(scale, page)
    codes, base = encode_scales(pages, (2, 3))
    return decode_scales(codes, base[:, :, None, None]).flatten(1, 2)[:, : scale.shape[1]]


def round_int8(x: Tensor) -> Tensor:
    """Symmetric int8 with one step over the last dimension."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / step).round() * step


def page_means(x: Tensor, page: int | None, int8: bool) -> Tensor:
    """The mean each token of [H, n, d] is stored against, expanded to [H, n, d]."""
    if page is None:
        return x.mean(1, keepdim=True).expand_as(x)
    pages, valid = to_pages(x, page)
    mean = pages.sum(2) / valid.sum(1)[:, None]
    if int8:
        mean = round_int8(mean)
    return mean.repeat_interleave(page, 1)[:, : x.shape[1]]


def nearest(size: Tensor, bits: int) -> Tensor:
    """The level that is nearest to each magnitude."""
    level = torch.full_like(size, LEVELS[bits][0])
    for low, high in pairwise(LEVELS[bits]):
        level.add_(size > (low + high) / 2, alpha=high - low)
    return level


def lloyd(
    x: Tensor, bits: int, group: int, fit: str, page: int, search: bool = False, states: int = 0
) -> tuple[Tensor, Tensor]:
    """Symmetric Lloyd-Max codes of [H, n, d]: (level per element, scale per group).

    Levels c are the nearest ones in units of the root mean square, or with `search` of the multiple
    of it that gives the least angle between x and c. The scale makes the error least ("mse"), the
    product with x right ("unbiased": <x, x> / <x, c>) or the norm ("norm": |x| / |c|). With `states`
    levels depend on those before them: of 2-bit codes all, of 3-bit ones the magnitudes.
    """
    heads, n, d = x.shape
    y = x.reshape(heads, n, d // group, group)
    size = y.abs()
    rms = size.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    if states:
        half = bits == 3  # signs are the index: only magnitudes may depend on others
        code = trellis_levels((size if half else y) / rms, states, half)
        code = torch.copysign(code, y) if half else code
    else:
        code = torch.copysign(nearest(size / rms, bits), y)
    if search:
        best = (y * code).sum(-1, keepdim=True) / code.norm(dim=-1, keepdim=True)
        for factor in SEARCHED:
            other = torch.copysign(nearest(size / (factor * rms), bits), y)
            cosine = (y * other).sum(-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
            code, best = torch.where(cosine > best, other, code), torch.maximum(cosine, best)
    inner, square, own = (y * code).sum(-1), size.square().sum(-1), code.square().sum(-1)
    scale = {
        "mse": inner / own,
        "unbiased": square / inner.clamp_min(1e-30),
        "norm": (square / own).sqrt(),
    }[fit]
    return code, round_e4m4(scale, page)


def shaped_codes(x: Tensor, scale: Tensor, bits: int, weight: Tensor, rotation: Tensor) -> Tensor:
    """Levels of x [H, n, d] at the scales [H, n, 1], channel after channel, each of which takes over
    the errors of those before (GPTQ, arXiv 2210.17323): least in the metric R diag(weight) R^T.
    """
    d = x.shape[-1]
    metric = torch.einsum("ic,hc,jc->hij", rotation, weight, rotation)
    damping = 0.1 * weight.mean(-1)[:, None, None] * torch.eye(d)
    factor = torch.linalg.cholesky(torch.linalg.inv(metric + damping)).mT
    y, code = x.clone(), torch.zeros_like(x)
    for j in range(d):
        code[..., j] = torch.copysign(nearest(y[..., j].abs() / scale[..., 0], bits), y[..., j])
        error = (y[..., j] - code[..., j] * scale[..., 0]) / factor[:, j, j, None]
        y[..., j + 1 :] -= error[..., None] * factor[:, None, j, j + 1 :]
    return code


def rotary_mean(k: Tensor, frequencies: Tensor, start: int, tokens: int = 256) -> Tensor:
    """Mean of the first keys of [H, n, d] as they were before RoPE, turned to the places from `start` on."""
    angle = torch.arange(start, start + k.shape[1])[:, None] * frequencies
    cos, sin = angle.cos(), angle.sin()
    a, b = k.chunk(2, -1)
    plain_a = (a * cos + b * sin)[:, :tokens].mean(1, keepdim=True)
    plain_b = (b * cos - a * sin)[:, :tokens].mean(1, keepdim=True)
    return torch.cat((plain_a * cos - plain_b * sin, plain_b * cos + plain_a * sin), -1)


def balance_vector(k: Tensor, q_sq: Tensor, limit: float = LIMIT) -> Tensor:
    """Vector s of [H, d] from keys [H, n, d] and the mean square of the queries [Hq, d]."""
    return measure_balance(k[None], q_sq.unflatten(0, (k.shape[0], -1)).mean(1), limit)


def encode_keys(
    k: Tensor,
    spec: KeySpec,
    balance: Tensor | None,
    square: Tensor | None = None,
    frequencies: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(k_index, k_hat, scale) of keys [H, n, d].

    The first two are what the index and what index + payload decode to, [H, n, d]; `scale` is
    the scale of each token in the index, [H, n]. `square` [H, d], the mean square of the queries, is
    for `shaped`; the frequencies of RoPE [d / 2] and the first key's place for `rotary`.
    """
    d = k.shape[-1]
    rotation = random_rotation(d, seed=0).to(k) if spec.rotate else torch.eye(d)
    s = torch.ones(k.shape[0], d) if balance is None else balance
    page = spec.page or 256
    known = torch.zeros_like(k)
    if spec.rotary:
        assert frequencies is not None
        known = (rotary_mean(k, frequencies, start) * s[:, None]) @ rotation.T
    x = (k * s[:, None]) @ rotation.T - known
    mean = page_means(x, spec.page, spec.int8_mean) if spec.centre else torch.zeros_like(x)
    residual = x - mean
    code, scale = lloyd(residual, spec.bits, d, spec.fit, page, spec.search, spec.states)
    code = code.flatten(2)
    if spec.shaped:
        assert square is not None
        weight = square.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2) / s.square()  # of RoPE's pairs
        code = shaped_codes(residual, scale, spec.bits, weight, rotation)
    index_scale = scale if spec.token_scale else mean_scale(scale, page)
    if spec.own_scale:  # a mean magnitude is MEAN_ABS scales of a Gaussian
        index_scale = round_e4m4(residual.abs().mean(-1, keepdim=True) / MEAN_ABS, page)
    known = known + mean
    index = known + torch.copysign(index_scale * spec.constant, code)
    full = known + code * scale

    def back(y: Tensor) -> Tensor:
        return (y @ rotation) / s[:, None]

    return back(index), k if spec.exact else back(full), index_scale[..., 0]


def mean_scale(scale: Tensor, page: int) -> Tensor:
    """Replace token scales [H, n, 1] by their page's mean."""
    return page_means(scale, page, int8=False)


def encode_values(v: Tensor, spec: ValueSpec) -> Tensor:
    """What values [H, n, d] decode to."""
    if spec.kind == "exact":
        return v
    heads, n, d = v.shape
    rotation = random_rotation(d, seed=1).to(v) if spec.rotate else torch.eye(d)
    x = v @ rotation.T
    group = spec.group or d
    if spec.kind == "lloyd":
        mean = page_means(x, spec.page, int8=True) if spec.centre else torch.zeros_like(x)
        code, scale = lloyd(x - mean, spec.bits, group, spec.fit, spec.page, spec.search, spec.states)
        out = mean + (code * scale[..., None]).flatten(2)
    else:
        y = x.reshape(heads, n, d // group, group)
        low, high = y.amin(-1), y.amax(-1)
        middle = round_int8(((low + high) / 2).flatten(1)).view_as(low)
        step = round_e4m4((high - low) * spec.clip / (2**spec.bits - 1), spec.page)
        base = middle - step * (2**spec.bits - 1) / 2
        code = ((y - base[..., None]) / step.clamp_min(1e-30)[..., None]).round()
        code = code.clamp(0, 2**spec.bits - 1)
        out = (base[..., None] + code * step[..., None]).flatten(2)
    return out @ rotation


def encode_paper(k: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's keys: centred signs in groups of 4, a codebook, and 2-bit magnitudes.

    Returns (k_index, k_hat). A code that no token uses gets sign pattern x mean magnitude.
    """
    heads, n, d = k.shape
    mean = k.mean(1, keepdim=True)
    x = k - mean
    positive = x >= 0
    weights = torch.tensor([1, 2, 4, 8])
    code = (positive.view(heads, n, d // 4, 4) * weights).sum(-1)  # [H, n, d/4]
    slot = (code + 16 * torch.arange(d // 4)).flatten(1)  # [H, n * d/4]
    sums = torch.zeros(heads, 4 * d, 4)
    sums.scatter_add_(1, slot[..., None].expand(-1, -1, 4), x.reshape(heads, -1, 4))
    counts = torch.zeros(heads, 4 * d).scatter_add_(1, slot, torch.ones_like(slot, dtype=torch.float))
    pattern = ((torch.arange(16)[:, None] & weights) > 0).float() * 2 - 1
    magnitude = x.abs().mean(1).view(heads, d // 4, 1, 4)
    default = (pattern * magnitude).flatten(1, 2)
    centroid = torch.where(counts[..., None] > 0, sums / counts.clamp_min(1)[..., None], default)
    index = centroid.gather(1, slot[..., None].expand(-1, -1, 4)).view(heads, n, d)
    alpha = x.abs().amax(1, keepdim=True).clamp_min(1e-8)
    size = minmax(x.abs() / alpha, 2, 32) * alpha
    return index + mean, torch.where(positive, size, -size) + mean
