"""Everything the cache holds for one attention layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..codec import PageFormat, measure_balance
from ..codec.paper import choose_pinned, prompt_statistics
from ..config import SelfIndexConfig
from ..errors import InputError, StateError
from .memory import Memory
from .pool import BlockPool
from .raw import RawTokens
from .table import BlockTable

ENCODE_PAGES = 32
"""Pages encoded at a time: bounds float32 temporaries, does not change the bytes."""

OBSERVED_QUERIES = 32
"""Last prompt queries that vote for the paper preset's full-precision tokens."""


def _outside_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors made in inference mode cannot be written outside it; a store is written in any mode."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


@dataclass(frozen=True)
class _Plan:
    """What one row's tokens become: (keys, values) [H, n, d] to encode and to keep raw."""

    encode: tuple[Tensor, Tensor]
    keep: tuple[Tensor, Tensor]
    prompt_tokens: int = 0


class LayerStore:
    """Encoded pages, full-precision tokens and statistics of one layer.

    A row of the batch is a sequence of tokens: sinks (full precision), encoded pages, and the
    recent tokens (full precision). Padding is never stored, so rows may differ in length.

    Args:
        like: any key tensor [B, H, T, d] of the layer; fixes batch, heads, head_dim, dtype, device.
        balance: float32 [H, d] from a profile, or None to measure it on the first page.
    """

    @_outside_inference_mode
    def __init__(self, config: SelfIndexConfig, like: Tensor, balance: Tensor | None = None) -> None:
        self.config = config
        self.format = PageFormat(
            config.preset, like.shape[1], like.shape[3], config.page_size, config.value_bits
        )
        self.pool = BlockPool(self.format, like.device, config.offloading)
        self.table = BlockTable(like.shape[0], self.pool)
        self.raw = RawTokens(like)
        self.constants: Tensor | None = None
        if balance is not None:
            if balance.shape != (like.shape[1], like.shape[3]):
                raise InputError(
                    f"the profile's balance has shape {tuple(balance.shape)}, this layer needs "
                    f"{(like.shape[1], like.shape[3])}; it was made for another model"
                )
            self.constants = balance.to(like.device, torch.float32)[None]
        self._query_square = like.new_zeros(like.shape[1], like.shape[3], dtype=torch.float32)
        self._queries_seen = 0
        # Paper preset only: rows whose statistics are fixed, and the length of their prompts.
        self._has_constants = [False] * like.shape[0]
        self._prompt_tokens = [0] * like.shape[0]

    @property
    def batch(self) -> int:
        return len(self.table.rows)

    def encoded(self, row: int) -> int:
        """Encoded tokens of a row."""
        return self.table.rows[row].tokens

    def length(self, row: int) -> int:
        """Tokens of a row, encoded or not."""
        return self.encoded(row) + self.raw.lengths[row]

    @_outside_inference_mode
    def append(
        self, keys: Tensor, values: Tensor, query: Tensor, valid: Tensor | None, scaling: float
    ) -> None:
        """Add new tokens and encode what no longer fits the recent window.

        Args:
            keys, values: [B, H, T, d]; query: [B, Hq, T, d], all post-RoPE.
            valid: bool [B, T], False for padding; None if there is none.
            scaling: factor on q.k, for the paper preset's choice of full-precision tokens.

        Raises:
            InputError: a key or value to be encoded is not finite. Nothing is stored then.
        """
        if self.constants is None and self.config.preset == "balanced":
            self._observe(query, valid)
        config = self.config
        limit = config.sinks + config.recent + config.page_size
        if keys.shape[2] == 1 and valid is None and self.raw.width < limit - 1:
            self.raw.append_step(keys, values)
            return
        plans = []
        for b in range(self.batch):
            new_k, new_v, new_q = keys[b], values[b], query[b]
            if valid is not None and not bool(valid[b].all()):
                new_k, new_v, new_q = (x[:, valid[b]] for x in (new_k, new_v, new_q))
            if config.preset == "paper" and self.length(b) == 0 and new_k.shape[1] > config.sinks:
                plans.append(self._plan_prompt(b, new_k, new_v, new_q, scaling))
            else:
                plans.append(self._plan_window(b, new_k, new_v))
        self._store(plans)

    @_outside_inference_mode
    def reserve(self, pages: int, raw_tokens: int) -> None:
        """Make room for `pages` more pages and `raw_tokens` full-precision tokens a row in all."""
        self.pool.reserve(pages)
        self.raw.reserve(raw_tokens)

    @_outside_inference_mode
    def encode_overflow(self) -> None:
        """Encode what no longer fits the recent window, after tokens were put into `raw`.

        Raises:
            InputError: as `append`. Nothing is encoded then.
        """
        equal = len(set(self.raw.lengths)) == 1
        if equal and self.config.preset == "balanced" and self.constants is not None:
            self._encode_overflow_of_equal_rows()
            return
        none = self.raw.keys[0, :, :0]
        self._store([self._plan_window(b, none, none) for b in range(self.batch)])

    def _encode_overflow_of_equal_rows(self) -> None:
        """All rows at once: what `_plan_window` and `_store` do one by one."""
        config, raw, held = self.config, self.raw, self.raw.lengths[0]
        first, pages = config.sinks, max(0, held - config.sinks - config.recent) // config.page_size
        last = first + pages * config.page_size
        if pages == 0:
            return
        keys, values = (
            x[:, :, first:last].unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1)
            for x in (raw.keys, raw.values)
        )
        self._check_finite(keys, values)
        full = torch.full((self.batch * pages,), config.page_size, dtype=torch.int32, device=raw.keys.device)
        blocks = self.pool.add(*self._encode_pages(keys, values, full, 0))
        for b in range(self.batch):
            self.table.append(b, blocks[b * pages : (b + 1) * pages], [config.page_size] * pages)
        for x in (raw.keys, raw.values):
            x[:, :, first : held - last + first] = x[:, :, last:held].clone()
        raw.lengths = [held - last + first] * self.batch

    def _store(self, plans: list[_Plan]) -> None:
        config = self.config
        self._fix_statistics([plan.encode[0] for plan in plans])
        pages = [self._encode(b, *p.encode) if p.encode[0].shape[1] else None for b, p in enumerate(plans)]
        # Nothing above changed what the rows hold, nothing below depends on the input's content.
        for b, (plan, encoded) in enumerate(zip(plans, pages, strict=True)):
            if encoded is not None:
                tokens, page = plan.encode[0].shape[1], config.page_size
                counts = [min(page, tokens - start) for start in range(0, tokens, page)]
                self.table.append(b, self.pool.add(*encoded), counts)
            self._prompt_tokens[b] = max(self._prompt_tokens[b], plan.prompt_tokens)
            self.raw.put(b, 0, *plan.keep)

    def _plan_window(self, row: int, new_k: Tensor, new_v: Tensor) -> _Plan:
        """Whole pages leave the front of the window, right behind the sinks."""
        config, held = self.config, self.raw.lengths[row]
        k = torch.cat((self.raw.keys[row, :, :held], new_k), 1)
        v = torch.cat((self.raw.values[row, :, :held], new_v), 1)
        beyond = max(0, k.shape[1] - config.sinks - config.recent)
        first, last = config.sinks, config.sinks + beyond // config.page_size * config.page_size
        kept = [torch.cat((x[:, :first], x[:, last:]), 1) for x in (k, v)]
        return _Plan((k[:, first:last], v[:, first:last]), (kept[0], kept[1]))

    def _plan_prompt(self, row: int, k: Tensor, v: Tensor, q: Tensor, scaling: float) -> _Plan:
        """Paper preset: pinned tokens stay in full precision, the rest of the prompt is encoded."""
        queries = q[:, -OBSERVED_QUERIES:].unflatten(0, (k.shape[0], -1))
        pinned = choose_pinned(k, queries, self.config.sinks, scaling)
        rest = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device).scatter(1, pinned, False)
        shape = (k.shape[0], k.shape[1] - self.config.sinks, k.shape[2])
        at = pinned[..., None].expand(-1, -1, k.shape[2])
        self._put_constants(row, prompt_statistics(k))
        return _Plan(
            (k[rest].view(shape), v[rest].view(shape)), (k.gather(1, at), v.gather(1, at)), k.shape[1]
        )

    def _fix_statistics(self, encode: list[Tensor]) -> None:
        """Fix what pages share, from the first tokens [H, n, d] that rows encode; then never again."""
        if self.config.preset == "paper":
            for b, keys in enumerate(encode):
                if keys.shape[1] and not self._has_constants[b]:
                    self._put_constants(b, prompt_statistics(keys))
        elif self.constants is None:
            first = [k[:, : self.config.page_size] for k in encode if k.shape[1]]
            if first:
                square = self._query_square / max(1, self._queries_seen)
                self.constants = measure_balance(torch.stack(first), square)[None]

    def _put_constants(self, row: int, constants: Tensor) -> None:
        if self.constants is None:
            self.constants = constants.new_zeros(self.batch, *constants.shape)
        self.constants[row] = constants
        self._has_constants[row] = True

    def _encode(self, row: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens [H, n, d] of a row into pages, the last one possibly short."""
        self._check_finite(keys, values)
        page, n = self.config.page_size, keys.shape[1]
        missing = -n % page
        shape = (keys.shape[0], -1, page, keys.shape[2])
        padded = [
            torch.nn.functional.pad(x, (0, 0, 0, missing)).view(shape).transpose(0, 1) for x in (keys, values)
        ]
        counts = torch.full((padded[0].shape[0],), page, dtype=torch.int32, device=keys.device)
        counts[-1] -= missing
        return self._encode_pages(padded[0], padded[1], counts, row)

    @staticmethod
    def _check_finite(keys: Tensor, values: Tensor) -> None:
        if not bool(torch.isfinite(keys).all() & torch.isfinite(values).all()):
            raise InputError(
                "keys or values hold NaN or infinity; they cannot be encoded. Check the model's "
                "dtype (fp16 overflows in some models; use bf16) and its inputs"
            )

    def _encode_pages(self, keys: Tensor, values: Tensor, counts: Tensor, row: int) -> tuple[Tensor, Tensor]:
        """Encode pages [n, H, P, d] with `counts` tokens each; `row` has the paper's constants."""
        assert self.constants is not None
        constants = self.constants if self.config.preset == "balanced" else self.constants[row : row + 1]
        planes = [
            ops.encode(k, v, c, constants, self.format.name)
            for k, v, c in zip(*(x.split(ENCODE_PAGES) for x in (keys, values, counts)), strict=True)
        ]
        return torch.cat([i for i, _ in planes]), torch.cat([p for _, p in planes])

    def _observe(self, query: Tensor, valid: Tensor | None) -> None:
        """Sum squares of the queries of the first page, which fix the balance with its keys."""
        room = self.config.sinks + self.config.page_size - max(map(self.length, range(self.batch)))
        if room <= 0:
            return
        square = query.float().square().unflatten(1, (self.format.kv_heads, -1)).mean(2)  # [B, H, T, d]
        if valid is None:
            square = square[:, :, :room]
            seen = square.shape[0] * square.shape[2]
        else:
            near = valid & (valid.cumsum(1) <= room)
            square = square * near[:, None, :, None]
            seen = int(near.sum())
        self._query_square += square.sum((0, 2))
        self._queries_seen += seen

    def check_crop(self, lengths: list[int]) -> None:
        """Raise StateError where `crop` to these lengths is impossible; change nothing."""
        for b, keep in enumerate(lengths):
            if 0 < keep < min(self._prompt_tokens[b], self.length(b)):
                raise StateError(
                    f"the paper preset cannot crop row {b} to {keep} tokens, inside its prompt of "
                    f"{self._prompt_tokens[b]}: each head keeps other prompt tokens in full precision. "
                    "Use preset='balanced', or reset the cache"
                )

    def crop(self, lengths: list[int]) -> None:
        """Keep the first `lengths[b]` tokens of every row.

        Raises:
            StateError: the paper preset would have to cut inside its prompt.
        """
        self.check_crop(lengths)
        sinks = self.config.sinks
        for b, keep in enumerate(lengths):
            encoded, held = self.encoded(b), self.raw.lengths[b]
            recent = held - sinks if encoded else held
            surplus = max(0, encoded + held - keep)
            if surplus <= recent:
                self.raw.lengths[b] = held - surplus
            else:
                self.table.crop(b, max(0, keep - sinks))
                self.raw.lengths[b] = min(sinks, keep)
            if keep == 0:
                self._prompt_tokens[b], self._has_constants[b] = 0, False

    @_outside_inference_mode
    def select_rows(self, rows: Tensor) -> None:
        """Make row i a copy of old row rows[i], int64 on any device; pages are shared."""
        rows = rows.to(self.raw.keys.device)
        order = rows.tolist()
        self.raw.select(rows)
        self.table.select(order)
        self._prompt_tokens = [self._prompt_tokens[i] for i in order]
        self._has_constants = [self._has_constants[i] for i in order]
        if self.constants is not None and self.config.preset == "paper":
            self.constants = self.constants[rows]

    def memory(self) -> Memory:
        """Bytes this layer holds."""
        pool, raw = self.pool, self.raw
        token = 2 * raw.keys.shape[1] * raw.keys.shape[3] * raw.keys.element_size()
        tables = sum(t.nbytes for t in self.table.tensors())
        constants = 0 if self.constants is None else self.constants.nbytes
        index, payload = pool.used * pool.index.shape[1], pool.used * pool.payload.shape[1]
        full = sum(raw.lengths) * token
        allocated = pool.index.nbytes + pool.payload.nbytes + raw.keys.nbytes + raw.values.nbytes
        return Memory(
            index=index,
            payload=payload,
            full_precision=full,
            statistics=constants + tables + self._query_square.nbytes,
            slack=allocated - index - payload - full,
            host=pool.payload.nbytes if pool.offloading else 0,
        )
