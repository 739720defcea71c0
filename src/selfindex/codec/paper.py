"""The `paper` preset: Self-Indexing KVCache as published (arXiv 2603.14224, method section).

Keys are centred by the prompt's mean; a group's sign pattern selects one of 16 centroids for
scoring; magnitudes are normalised by the channel's largest |key| and stored in 2 bits with scale
and zero point per 32 channels, values likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import packing
from .format import PAPER_GROUP, PageFormat

_LARGEST_HALF = torch.finfo(torch.float16).max
_STATISTICS_TOKENS = 8192
"""Tokens at a time of the prompt's statistics: bounds float32 temporaries."""


class PaperCodec:
    """Codec of the `paper` preset.

    `constants` holds, per row and head: mean [d], alpha [d] and codebook [d / 4, 16, 4], flat.
    """

    def __init__(self, fmt: PageFormat) -> None:
        self.format = fmt

    def split(self, constants: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, H, d], alpha [B, H, d], codebook [B, H, d / 4, 16, 4]."""
        d = self.format.head_dim
        mean, alpha, codebook = constants.split((d, d, 16 * d), dim=-1)
        return mean, alpha, codebook.unflatten(-1, (d // 4, 16, 4))

    def encode(
        self, keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor
    ) -> tuple[Tensor, Tensor]:
        fmt, device = self.format, keys.device
        n, p = keys.shape[0], fmt.page_size
        live = (torch.arange(p, device=device) < counts.to(device)[:, None])[:, None, :, None]
        index = torch.zeros(n, fmt.index_bytes, dtype=torch.uint8, device=device)
        payload = torch.zeros(n, fmt.payload_bytes, dtype=torch.uint8, device=device)
        mean, alpha, _ = self.split(constants)
        centred = keys.float() - mean[:, :, None, :]
        fmt.view(index, fmt.index, "codes").copy_(packing.pack_bits((centred >= 0) & live))
        fmt.count(index).copy_(counts)
        magnitudes = torch.where(alpha[:, :, None, :] > 0, centred.abs() / alpha[:, :, None, :], 0.0)
        for name, x in (("key", magnitudes), ("value", values.float())):
            codes, scale, zero = _quantise(torch.where(live, x, 0.0))
            plane = "magnitudes" if name == "key" else "values"
            fmt.view(payload, fmt.payload, plane).copy_(packing.pack_crumbs(codes))
            fmt.view(payload, fmt.payload, f"{name}_scale").copy_(scale)
            fmt.view(payload, fmt.payload, f"{name}_zero").copy_(zero)
        return index, payload

    def map_query(self, query: Tensor, constants: Tensor) -> Tensor:
        return query.float()

    def unmap_keys(self, keys: Tensor, constants: Tensor) -> Tensor:
        return keys

    def unmap_output(self, output: Tensor) -> Tensor:
        return output

    def lut(self, query: Tensor, constants: Tensor) -> Tensor:
        codebook = self.split(constants)[2]
        grouped = query.unflatten(-1, (-1, 4))  # [B, H, ..., d / 4, 4]
        shape = (*codebook.shape[:2], *([1] * (grouped.ndim - 4)), *codebook.shape[2:])
        return (codebook.view(shape) @ grouped.unsqueeze(-1)).squeeze(-1)

    def token_gain(self, index: Tensor) -> None:
        return None

    def page_offset(self, query: Tensor, index: Tensor, constants: Tensor) -> Tensor:
        offset = torch.einsum("bhtd,bhd->bht", query, self.split(constants)[0].expand(query.shape[0], -1, -1))
        return offset[..., None].expand(*offset.shape, index.shape[1])

    def read_keys(
        self, index: Tensor, payload: Tensor, block: Tensor, offset: Tensor, constants: Tensor
    ) -> Tensor:
        fmt = self.format
        head = torch.arange(fmt.kv_heads, device=block.device)[:, None]
        at = (block, head, offset)
        mean, alpha, _ = self.split(constants)
        signs = packing.unpack_bits(fmt.view(index, fmt.index, "codes")[at])
        size = _dequantise(fmt, payload, "key", "magnitudes", at) * alpha[:, :, None, :]
        return torch.where(signs, size, -size) + mean[:, :, None, :]

    def read_values(self, index: Tensor, payload: Tensor, block: Tensor, offset: Tensor) -> Tensor:
        fmt = self.format
        head = torch.arange(fmt.kv_heads, device=block.device)[:, None]
        return _dequantise(fmt, payload, "value", "values", (block, head, offset))


def prompt_statistics(keys: Tensor) -> Tensor:
    """Statistics of prompts' keys [..., H, N, d] -> float32 constants [..., H, 18 d].

    mean: per channel. alpha: largest |centred key| per channel. codebook: mean of the centred
    sub-vectors that have a code; a code nobody has gets its sign pattern times the mean |key|.
    """
    if keys.ndim > 3:
        return torch.stack([prompt_statistics(row) for row in keys])
    mean = keys.mean(1, dtype=torch.float32)
    low, high = (extreme.float() for extreme in (keys.amin(1), keys.amax(1)))
    alpha = torch.maximum(high - mean, mean - low)
    sums = keys.new_zeros(keys.shape[0], keys.shape[2] // 4, 16, 5, dtype=torch.float32)
    for part in keys.split(_STATISTICS_TOKENS, 1):
        sums += code_sums(part, mean)
    return statistics_from_sums(mean, alpha, sums, keys.shape[1])


def code_sums(keys: Tensor, mean: Tensor) -> Tensor:
    """Per group of 4 channels and code: sums of its centred sub-vectors, and how many there are.

    Args:
        keys: [H, N, d]; mean: float32 [H, d].
    Returns:
        float32 [H, d / 4, 16, 5].
    """
    centred = keys.float() - mean[:, None, :]
    groups = centred.unflatten(-1, (-1, 4)).transpose(1, 2)  # [H, d / 4, N, 4]
    codes = packing.group_codes(packing.pack_bits(centred >= 0)).transpose(1, 2)  # [H, d / 4, N]
    onehot = (codes[..., None] == torch.arange(16, device=keys.device)).float()
    return torch.cat((onehot.transpose(-1, -2) @ groups, onehot.sum(2)[..., None]), -1)


def statistics_from_sums(mean: Tensor, alpha: Tensor, sums: Tensor, tokens: int) -> Tensor:
    """Constants of prompts of `tokens` tokens, see `prompt_statistics`, from their sums of `code_sums`."""
    totals, members = sums[..., :4], sums[..., 4:]
    patterns = (torch.arange(16, device=sums.device)[:, None] >> torch.arange(4, device=sums.device)) & 1
    signs = patterns.float() * 2 - 1
    # Within a code signs are fixed: its sums are those of the channels' sizes.
    size = (totals * signs).sum(-2, keepdim=True) / tokens
    codebook = torch.where(members > 0, totals / members.clamp(min=1), signs * size)
    return torch.cat((mean, alpha, codebook.flatten(-3)), dim=-1)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2 bits between the least and largest value of each group of 32 channels.

    Scale and zero point are finite whatever the values: groups that lie beyond half precision are cut
    off at four times its largest number if they have one sign, at twice if they have both.
    """
    groups = -(-x.shape[-1] // PAPER_GROUP)
    missing = groups * PAPER_GROUP - x.shape[-1]
    # A head_dim that is no multiple of 32 leaves a short last group; repeating its last channel
    # does not move its extremes.
    padded = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], missing)), -1) if missing else x
    grouped = padded.unflatten(-1, (groups, PAPER_GROUP))
    low, high = grouped.amin(-1), grouped.amax(-1)
    # Code 0 is the end of the range that half precision holds; from there 3 steps reach four times as far.
    mirrored = (low < -_LARGEST_HALF) & (high < -low)
    start, end = torch.where(mirrored, high, low), torch.where(mirrored, low, high)
    zero = start.clamp(-_LARGEST_HALF, _LARGEST_HALF)
    scale = ((end - zero) / 3).clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
    zero = zero.half()
    step = scale.float()[..., None]
    codes = torch.where(step != 0, (grouped - zero.float()[..., None]) / step, 0.0)
    return codes.round().clamp(0, 3).flatten(-2)[..., : x.shape[-1]].to(torch.uint8), scale, zero


def _dequantise(fmt: PageFormat, payload: Tensor, kind: str, plane: str, at: tuple) -> Tensor:
    codes = packing.unpack_crumbs(fmt.view(payload, fmt.payload, plane)[at]).float()
    scale = fmt.view(payload, fmt.payload, f"{kind}_scale")[at].float()
    zero = fmt.view(payload, fmt.payload, f"{kind}_zero")[at].float()
    spread = [t.repeat_interleave(PAPER_GROUP, -1)[..., : codes.shape[-1]] for t in (scale, zero)]
    return codes * spread[0] + spread[1]
