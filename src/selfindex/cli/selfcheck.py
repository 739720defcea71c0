"""The self-check of `selfindex doctor`: every operator as a cache calls it, against plain attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import ops, reference
from ..backends.fallback import observed
from ..codec import Codec, PageFormat, codec_for, measure_balance
from ..codec.rotation import HEAD_DIMS
from ..config import SelfIndexConfig
from ..index.select import sum_of_softmax

HEADS, GROUP, PAGES = 2, 2, 2
PAGE = SelfIndexConfig().page_size
BUDGET = 32
"""Tokens selected, and planted so that they stand out: rounding of scores cannot change the selection."""
QUERIES = {"decode step": 1, "short chunk": 4, "long chunk": 128}
"""New queries at once; a long chunk is more than kernels for few queries serve."""
HELD, ROOM = 80, 96
"""Full-precision tokens of the window, and how many there is room for."""
TOLERANCE = 1e-3
"""Allowed relative difference (L2) between an operator and its plain form.

Compiled operators keep queries in 15 bits, which moves outputs by up to 1e-4 here. One exchanged token
or a wrong scale moves them by 1e-2 and more.
"""
GPU_TOLERANCE = 8e-3
"""The same on a GPU, whose kernels multiply 16-bit numbers."""
BYTES = 5e-3
"""Share of encoded bytes that may differ from the reference's: those where rounding decides."""
SIMILARITY = 0.7
"""Least cosine between attention over 2-bit codes and over the originals; 0.8 to 0.95 is usual here."""


@dataclass(frozen=True)
class Check:
    """Outcome for one preset, head dimension and dtype.

    Attributes:
        difference: largest relative difference from the plain operators and attention.
        failures: what went wrong, in words; empty if all is well.
        fast: what was served by compiled operators or CUDA kernels.
        slow: what was served by plain PyTorch.
    """

    preset: str
    head_dim: int
    difference: float
    failures: list[str]
    fast: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


def variants(device: torch.device) -> list[tuple[int, torch.dtype]]:
    """Head dimensions and dtypes to check: on a GPU, whose kernels are compiled first, the usual ones."""
    usual = [(head_dim, torch.bfloat16) for head_dim in (64, 128)]
    if device.type == "cuda":
        return usual
    return [(head_dim, torch.float32) for head_dim in HEAD_DIMS] + usual


@dataclass
class _Run:
    """Runs operators, and notes their names, who served them and what was wrong."""

    tolerance: float
    difference: float = 0.0
    failures: list[str] = field(default_factory=list)
    served: dict[str, bool] = field(default_factory=dict)

    def __call__(self, name: str, operator: Callable[..., Any], *arguments: Any) -> Any:
        calls: list[bool] = []
        with observed(lambda _, fast, __: calls.append(fast)):
            result = operator(*arguments)
        if calls:
            self.served[name] = all(calls)
        return result

    def compare(self, name: str, got: Tensor, wanted: Tensor, rounding: float = 0.0) -> None:
        error = float((got.float() - wanted.float()).norm() / wanted.float().norm())
        self.difference = max(self.difference, error - rounding)
        if not error < self.tolerance + rounding:  # also true for NaN
            self.failures.append(f"{name} differs from plain attention by {error:.1e}")


def check(preset: str, head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Check:
    """Run every operator on random pages and compare it with the obvious way; never raises."""
    run = _Run(GPU_TOLERANCE if device.type == "cuda" else TOLERANCE)
    try:
        _check(run, preset, head_dim, device, dtype)
    except Exception as error:
        run.failures.append(f"{type(error).__name__}: {error}")
    fast, slow = (tuple(n for n, was in run.served.items() if was == kind) for kind in (True, False))
    return Check(preset, head_dim, run.difference, run.failures, fast, slow)


@torch.inference_mode()
def _check(run: _Run, preset: str, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
    codec = codec_for(PageFormat(preset, HEADS, head_dim, PAGE).name)
    generator = torch.Generator().manual_seed(head_dim)
    tokens, scaling, name = PAGES * PAGE, head_dim**-0.5, codec.format.name

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    query = random(1, HEADS, 1, 1, head_dim).expand(-1, -1, GROUP, -1, -1).flatten(1, 2)  # [1, Hq, 1, d]
    keys, values = random(1, HEADS, tokens, head_dim), random(1, HEADS, tokens, head_dim)
    planted = torch.randperm(tokens, generator=generator, device="cpu")[:BUDGET].sort().values
    keys[:, :, planted] += 2 * query[:, ::GROUP]  # tokens that attention must find
    query, keys, values = (x.to(device, dtype) for x in (query, keys, values))
    raw = tuple(x[0].unflatten(1, (PAGES, PAGE)).transpose(0, 1) for x in (keys, values))  # [M, H, P, d]
    counts = torch.full((PAGES,), PAGE, dtype=torch.int32, device=device)
    constants = _constants(run, preset, keys, query)
    given = (raw[0], raw[1], counts, constants, name)
    index, payload = run("encode", ops.encode, *given)
    for got, wanted in zip((index, payload), reference.encode(*given), strict=True):
        other = float((got != wanted).float().mean())
        if not other < BYTES:
            run.failures.append(f"encode gives other bytes than the reference ({other:.1%} of them)")
    table = torch.arange(PAGES, dtype=torch.int32, device=device)[None]
    stored, rest = (index, payload, table), (constants, scaling, name)

    logits = run("score", ops.score, query, index, table, counts[None], *rest)
    scores = sum_of_softmax(logits, HEADS)
    budget = torch.tensor([BUDGET], dtype=torch.int32, device=device)
    slots = run("select", ops.select, scores, budget, BUDGET)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :BUDGET].sort(-1).values
    if not torch.equal(slots.long(), best):
        run.failures.append("select is not the sorted top of the scores")
    if not torch.isin(planted.to(device), slots[0, 0, 0]).all():
        run.failures.append("the index missed tokens that dominate attention")
    every = torch.arange(tokens, dtype=torch.int32, device=device).expand(1, HEADS, 1, -1)
    for chosen in (slots, every):
        part = run("sparse_attend", ops.sparse_attend, query, *stored, chosen, *rest)
        run.compare("sparse_attend", part[0], _plain(codec, query, stored, chosen[:, :, 0], *rest[:2]))
    _check_similarity(run, part[0], query, keys, values, scaling)
    _check_window(run, random, query, part, scaling)
    _check_memory(run, query, stored, counts[None], part, constants, name)
    for chunk, length in QUERIES.items():
        many = query.expand(-1, -1, length, -1).contiguous()
        operators: dict[str, tuple[Any, ...]] = {"dense_attend": (every, counts[None])}
        if length <= SelfIndexConfig().sparse_queries:
            operators["sparse_decode"] = (slots, counts[None], budget, BUDGET)
        for operator, (chosen, *arguments) in operators.items():
            label = f"{operator} of a {chunk}"
            output, _ = run(label, getattr(ops, operator), many, *stored, *arguments, *rest)
            run.compare(label, output, _plain(codec, many, stored, chosen[:, :, 0], *rest[:2]))


def _check_memory(
    run: _Run,
    query: Tensor,
    stored: tuple[Tensor, Tensor, Tensor],
    counts: Tensor,
    part: tuple[Tensor, Tensor],
    constants: Tensor,
    name: str,
) -> None:
    """Pages decoded to memory, and two equal parts merged: as a long chunk on a GPU has it."""
    first, rounding = torch.zeros_like(counts[:, 0]), torch.finfo(query.dtype).eps
    got, wanted = (query.new_zeros(2, HEADS, PAGES * PAGE, query.shape[3]) for _ in range(2))
    run("decode_pages", ops.decode_pages, *stored, counts, first, *got, constants, name)
    reference.decode_pages(*stored, counts, first, wanted[0], wanted[1], constants, name)
    run.compare("decode_pages", got, wanted, rounding)
    merged = torch.empty_like(query)
    run("merge_into", ops.merge_into, [part[0]] * 2, [part[1]] * 2, None, merged)
    run.compare("merge_into", merged, part[0], rounding)


def _check_window(
    run: _Run, random: Callable[..., Tensor], query: Tensor, part: tuple[Tensor, Tensor], scaling: float
) -> None:
    """A decode step's full-precision part, with what it writes."""
    dim = query.shape[3]
    new = [random(1, HEADS, 1, dim).to(query) for _ in range(2)]
    keys, values = (random(1, HEADS, ROOM, dim).to(query) for _ in range(2))
    others = keys.clone(), values.clone()
    lengths = torch.tensor([HELD], dtype=torch.int32, device=query.device)
    first, rest = (query.contiguous(), *new), (lengths, *part, None, scaling)
    got = run("window_attend", ops.window_attend, *first, keys, values, *rest)
    plain: Callable[..., Tensor] = reference.window_attend
    wanted = plain(*first, *others, *rest)
    run.compare("window_attend", got, wanted, rounding=torch.finfo(query.dtype).eps)
    if not all(torch.equal(a, b) for a, b in zip((keys, values), others, strict=True)):
        run.failures.append("window_attend stored something else than the new token")


def _check_similarity(
    run: _Run, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> None:
    exact = _attention(query.float(), keys.float(), values.float(), scaling)
    similarity = torch.cosine_similarity(output.flatten(), exact.flatten(), dim=0)
    if not similarity > SIMILARITY:
        run.failures.append(f"compressed attention is unlike the exact one (cosine {float(similarity):.2f})")


def _constants(run: _Run, preset: str, keys: Tensor, query: Tensor) -> Tensor:
    if preset == "paper":
        found: Tensor = run("prompt_statistics", ops.prompt_statistics, keys[0])
        run.compare("prompt_statistics", found, reference.prompt_statistics(keys[0]))
        return found[None]
    keys, query = keys.float(), query.float()
    return measure_balance(keys, query.square().mean((0, 2)).unflatten(0, (HEADS, GROUP)).mean(1))[None]


def _plain(
    codec: Codec,
    query: Tensor,
    stored: tuple[Tensor, Tensor, Tensor],
    slots: Tensor,
    constants: Tensor,
    scaling: float,
) -> Tensor:
    """Attention over decoded tokens, spelled out: query [1, Hq, T, d], slots int [1, H, K]."""
    index, payload, _ = stored  # the table is the identity
    block, offset = slots.long() // PAGE, slots.long() % PAGE
    keys = codec.read_keys(index, payload, block, offset, constants)
    values = codec.unmap_output(codec.read_values(index, payload, block, offset))
    grouped = query.float().unflatten(1, (HEADS, GROUP)).flatten(2, 3)
    mapped = codec.map_query(grouped, constants).view(query.shape)
    return _attention(mapped, keys, values, scaling)


def _attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    keys, values = keys.repeat_interleave(GROUP, 1), values.repeat_interleave(GROUP, 1)
    return (query @ keys.transpose(-1, -2) * scaling).softmax(-1) @ values
