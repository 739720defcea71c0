"""Everything the cache holds for one attention layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from ..backends import ops
from ..backends.operators.measure_balance import square_of
from ..codec import PageFormat
from ..config import SelfIndexConfig
from ..errors import InputError, StateError
from .change import Change, RowChange, advanced_by, check_finite
from .memory import Memory, memory_of
from .pinned import LONGEST_DRAFT, keep_pinned, pin
from .pool import BlockPool, Part
from .rows import leave_window
from .statistics import Statistics
from .table import BlockTable
from .window import Window


def _outside_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors made in inference mode cannot be written outside it; a store is written in any mode."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_inference_mode_enabled() or torch.is_grad_enabled()):
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


class LayerStore:
    """Encoded pages, full-precision tokens and statistics of one layer.

    A row of the batch is a sequence of tokens: sinks (full precision), encoded pages, and the
    recent tokens (full precision). Padding is never stored, so rows may differ in length.

    Args:
        like: any key tensor [B, H, T, d] of the layer; fixes batch, heads, head_dim, dtype, device.
        balance: float32 [H, d] from a profile, or None to measure that of each row on its first page.
    """

    @_outside_inference_mode
    def __init__(self, config: SelfIndexConfig, like: Tensor, balance: Tensor | None = None) -> None:
        self.config = config
        heads, dim = like.shape[1], like.shape[3]
        self.format = PageFormat(config.preset, heads, dim, config.page_size, config.value_bits)
        self.pool = BlockPool(self.format, like.device, config.offloading)
        self.table = BlockTable(like.shape[0], self.pool)
        self.window = Window(like)
        if balance is not None and balance.shape != (like.shape[1], like.shape[3]):
            raise InputError(
                f"the profile's balance has shape {tuple(balance.shape)}, this layer needs "
                f"{(like.shape[1], like.shape[3])}; it was made for another model"
            )
        self.statistics = Statistics.of(like, balance)

    @property
    def constants(self) -> Tensor | None:
        """What operators need to read pages; see `Statistics`."""
        return self.statistics.constants

    @property
    def batch(self) -> int:
        return len(self.table.rows)

    def encoded(self, row: int) -> int:
        """Encoded tokens of a row."""
        return self.table.rows[row].tokens

    def length(self, row: int) -> int:
        """Tokens of a row, encoded or not."""
        return self.encoded(row) + self.window.lengths[row]

    def append(
        self, keys: Tensor, values: Tensor, query: Tensor, valid: Tensor | None, scaling: float
    ) -> None:
        """Add new tokens and encode what no longer fits the recent window: `plan` and `commit`."""
        self.commit(self.plan(keys, values, query, valid, scaling))

    @_outside_inference_mode
    def plan(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        valid: Tensor | None,
        scaling: float,
        drafts: bool = False,
        check: Callable[[Tensor, Tensor], None] = check_finite,
    ) -> Change:
        """Work out how new tokens are stored; whatever this raises, the store holds what it held.

        Args:
            keys, values: [B, H, T, d]; query: [B, Hq, T, d], all post-RoPE.
            valid: bool [B, T], False for padding; None if there is none.
            scaling: factor on q.k, for the paper preset's choice of full-precision tokens.
            drafts: the last tokens may be drafts that `crop` takes back.
            check: called with keys and values that are encoded, which have to be finite.

        Raises:
            InputError: a key or value to be encoded is not finite, from `check`.
        """
        config = self.config
        if keys.shape[2] == 1 and valid is None and self.window.width + 1 < self.window_limit:
            statistics = self._observed(query)
            self.window.reserve(self.window.width + 1)
            return Change(statistics, step=(keys, values))
        lengths = [self.length(b) for b in range(self.batch)]
        keys, values, pinned = pin(config, lengths, keys, values, query, valid, scaling, drafts)
        if valid is None and self._rows_are_equal():
            return pinned.noted(self._plan_equal_rows(keys, values, query, check))
        prompt = keys.shape[2] - (LONGEST_DRAFT if drafts else 0)
        whole = config.preset == "paper" and valid is None and prompt > config.sinks
        if whole and not any(lengths):
            rows = keep_pinned(config, keys, values, query, scaling, prompt)
            return self._encode_rows(rows, list(query), check)
        rows, queries = [], []
        for b in range(self.batch):
            new_k, new_v, new_q = keys[b], values[b], query[b]
            if valid is not None and not bool(valid[b].all()):
                new_k, new_v, new_q = (x[:, valid[b]] for x in (new_k, new_v, new_q))
            queries.append(new_q)
            first = config.preset == "paper" and self.length(b) == 0
            prompt = new_k.shape[1] - (LONGEST_DRAFT if drafts else 0)
            if first and prompt > config.sinks:
                alone = new_k[None], new_v[None], new_q[None]
                rows += keep_pinned(config, *alone, scaling, prompt)
            elif first and drafts:
                rows.append(RowChange((new_k[:, :0], new_v[:, :0]), (new_k, new_v)))
            else:
                rows.append(leave_window(config, self.window, b, new_k, new_v))
        return pinned.noted(self._encode_rows(rows, queries, check))

    def commit(self, change: Change) -> None:
        """Store what `plan` worked out. Writes in place: nothing here depends on what is written."""
        if change.writes:
            self._write(change)
        if change.advanced:
            self.window.lengths = [n + change.advanced for n in self.window.lengths]
        if change.statistics is not None:
            self.statistics = change.statistics.placed(self.statistics)

    @_outside_inference_mode
    def _write(self, change: Change) -> None:
        blocks = [] if change.pages is None else self.pool.add_encoded(change.pages)
        for row, counts in change.owners:
            self.table.append(row, blocks[: len(counts)], counts)
            blocks = blocks[len(counts) :]
        for rows, start, keys, values in change.window:
            self.window.put(rows, start, keys, values)
        if change.step is not None:
            self.window.append_step(*change.step)

    @_outside_inference_mode
    def reserve(self, pages: int, window_tokens: int) -> None:
        """Make room for `pages` more pages and `window_tokens` full-precision tokens a row in all."""
        self.pool.reserve(pages)
        self.window.reserve(window_tokens)

    @property
    def window_limit(self) -> int:
        """Full-precision tokens of a row at which a page of them is encoded."""
        return self.config.front + self.config.recent + self.config.page_size

    def plan_step(
        self,
        new: int,
        check: Callable[[Tensor, Tensor], None] = check_finite,
        query: Tensor | None = None,
    ) -> Change:
        """Work out how to take over `new` tokens a row that a decode step has written behind those held.

        Args:
            query: [B, Hq, new, d] of the step, if it has not counted them for the balance itself.

        Raises:
            InputError: as `plan`.
        """
        if self.window.width + new >= self.window_limit:
            return self._plan_overflow(new, check, query)
        if query is None or not any(self.unobserved):
            return advanced_by(new)
        return Change(self._observed(query), advanced=new)

    @_outside_inference_mode
    def _plan_overflow(
        self, new: int, check: Callable[[Tensor, Tensor], None], query: Tensor | None
    ) -> Change:
        none = self.window.keys[:, :, :0]
        query = none if query is None else query
        if self._rows_are_equal():
            return self._plan_equal_rows(none, none, query, check, new)
        rows = [leave_window(self.config, self.window, b, none[b], none[b], new) for b in range(self.batch)]
        return self._encode_rows(rows, list(query), check)

    def _rows_are_equal(self) -> bool:
        """Whether rows leave their windows at the same places."""
        if self.config.preset == "paper" or len(set(self.window.lengths)) > 1:
            return False
        now = self.statistics
        if now.shared or all(now.has_constants):
            return True
        return not any(now.has_constants) and len(set(now.queries_seen)) == 1

    def _plan_equal_rows(
        self,
        keys: Tensor,
        values: Tensor,
        query: Tensor,
        check: Callable[[Tensor, Tensor], None],
        written: int = 0,
    ) -> Change:
        """All rows at once, as `leave_window` and `_encode_rows` do one by one, and without their copies."""
        config, window, held = self.config, self.window, self.window.lengths[0] + written
        first, tokens, everyone = config.front, held + keys.shape[2], slice(None)
        pages = max(0, tokens - first - config.recent) // config.page_size
        if not pages:
            window.reserve(tokens)
            return Change(self._observed(query), window=((everyone, held, keys, values),))
        last = first + pages * config.page_size
        held_pair = window.keys[:, :, :held], window.values[:, :, :held]
        if held and keys.shape[2]:
            whole = torch.cat((held_pair[0], keys), 2), torch.cat((held_pair[1], values), 2)
        else:
            whole = held_pair if held else (keys, values)
        leaving = [x[:, :, first:last] for x in whole]
        check(leaving[0], leaving[1])
        statistics, full = self.statistics, [config.page_size] * pages
        if not statistics.fixed(0):
            own = query[:, :, : self.unobserved[0]]
            seen = statistics.queries_seen[0] + own.shape[2]
            first_pages = leaving[0][:, :, : config.page_size]
            balance = ops.measure_balance(own, first_pages, statistics.query_square, seen)
            statistics = replace(statistics, constants=balance, has_constants=(True,) * self.batch)
        paged = [x.unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1) for x in leaving]
        constants = cast(Tensor, statistics.constants)
        if pages > 1 and constants.shape[0] > 1:
            constants = constants.repeat_interleave(pages, 0)  # of each page
        encoded = self.pool.encode([Part(paged[0], paged[1], full * self.batch, constants)])
        # What can run out of memory comes before anything is written.
        window.reserve(first + tokens - last)
        tail = [x[:, :, last:].clone() if whole is held_pair else x[:, :, last:] for x in whole]
        kept = [(everyone, first, tail[0], tail[1])]
        if held < first:
            kept.insert(0, (everyone, held, whole[0][:, :, held:first], whole[1][:, :, held:first]))
        return Change(statistics, encoded, tuple((b, full) for b in range(self.batch)), tuple(kept))

    def _encode_rows(
        self, rows: list[RowChange], queries: list[Tensor], check: Callable[[Tensor, Tensor], None]
    ) -> Change:
        """Encode what leaves the windows of rows; queries: of the new tokens of each, [Hq, n, d]."""
        paper = self.config.preset == "paper"
        statistics = self._fix_paper(rows) if paper else self._fix_balance(rows, queries)
        page, parts, owners = self.config.page_size, [], []
        for b, row in enumerate(rows):
            tokens = row.encode[0].shape[1]
            if tokens:
                counts = [min(page, tokens - start) for start in range(0, tokens, page)]
                constants = cast(Tensor, statistics.constants)
                own = constants if statistics.shared else constants[b : b + 1]
                check(*row.encode)
                parts.append(Part.of_row(*row.encode, counts, page, own))
                owners.append((b, counts))
        encoded = self.pool.encode(parts) if parts else None
        # What can run out of memory comes before anything is written.
        self.window.reserve(max(row.keep[0].shape[1] for row in rows))
        window = tuple((slice(b, b + 1), 0, row.keep[0], row.keep[1]) for b, row in enumerate(rows))
        return Change(statistics, encoded, tuple(owners), window)

    def _fix_paper(self, rows: list[RowChange]) -> Statistics:
        """Constants of rows that have none, from their prompts or the first tokens that they encode."""
        now, fresh = self.statistics, {}
        prompts = list(now.prompt_tokens)
        for b, row in enumerate(rows):
            if row.constants is not None:
                fresh[b] = row.constants
                prompts[b] = max(prompts[b], row.prompt)
            elif row.encode[0].shape[1] and not now.has_constants[b]:
                fresh[b] = ops.prompt_statistics(row.encode[0])
        return replace(now, prompt_tokens=tuple(prompts)).fix(fresh) if fresh else now

    def _fix_balance(self, rows: list[RowChange], queries: list[Tensor]) -> Statistics:
        """The balance of rows that encode their first page; of others without one, what queries add to it."""
        now, fresh, square = self.statistics, {}, None
        seen, rooms = list(now.queries_seen), self.unobserved
        for b, (row, new) in enumerate(zip(rows, queries, strict=True)):
            query = new[None, :, : rooms[b]]
            if row.encode[0].shape[1] and not now.fixed(b):
                page, before = row.encode[0][None, :, : self.config.page_size], now.query_square[b : b + 1]
                fresh[b] = ops.measure_balance(query, page, before, seen[b] + query.shape[2])[0]
            elif query.shape[2]:
                square = now.query_square.clone() if square is None else square
                square[b] += self.square(query).sum(2)[0]
                seen[b] += query.shape[2]
        if square is not None:
            now = replace(now, query_square=square, queries_seen=tuple(seen))
        return now.fix(fresh)

    @property
    def unobserved(self) -> list[int]:
        """Tokens of each row whose queries will still count for the balance, which its first page fixes."""
        now = self.statistics
        if self.config.preset == "paper" or now.shared or all(now.has_constants):
            return [0] * self.batch
        room = self.config.front + self.config.page_size
        return [0 if now.has_constants[b] else max(0, room - self.length(b)) for b in range(self.batch)]

    @_outside_inference_mode
    def _observed(self, query: Tensor) -> Statistics:
        """With squares of the queries [B, Hq, T, d] of new tokens that are of the first page of their row."""
        now, rooms = self.statistics, self.unobserved
        if not any(rooms):
            return now
        square = self.square(query[:, :, : max(rooms)])
        tokens = square.shape[2]
        if min(rooms) < tokens:
            order = torch.arange(tokens, device=query.device)
            square = square * (order < torch.tensor(rooms, device=query.device)[:, None])[:, None, :, None]
        seen = tuple(n + min(room, tokens) for n, room in zip(now.queries_seen, rooms, strict=True))
        return replace(now, query_square=now.query_square + square.sum(2), queries_seen=seen)

    def square(self, query: Tensor) -> Tensor:
        """What the statistics sum up of queries; see `square_of`."""
        return square_of(query, self.format.kv_heads)

    def check_crop(self, lengths: list[int]) -> None:
        """Raise StateError where `crop` to these lengths is impossible; change nothing."""
        for b, (keep, prompt) in enumerate(zip(lengths, self.statistics.prompt_tokens, strict=True)):
            if 0 < keep < min(prompt, self.length(b)):
                raise StateError(
                    f"row {b} cannot be cropped to {keep} tokens, inside its prompt of {prompt}: each head "
                    "keeps other prompt tokens in full precision. Use preset='balanced' without "
                    "pinned_tokens, reset the cache, or call cache.activate_past_recording() before a first "
                    "chunk that ends in drafts"
                )

    def crop(self, lengths: list[int]) -> None:
        """Keep the first `lengths[b]` tokens of every row.

        Raises:
            StateError: it would have to cut inside a prompt some of whose tokens are pinned.
        """
        self.check_crop(lengths)
        front = int(self.config.front)  # a number that the preset chose is of a type of its own
        for b, keep in enumerate(lengths):
            encoded, held = self.encoded(b), self.window.lengths[b]
            recent = held - front if encoded else held
            surplus = max(0, encoded + held - keep)
            if surplus <= recent:
                self.window.lengths[b] = held - surplus
            else:
                self.table.crop(b, max(0, keep - front))
                self.window.lengths[b] = min(front, keep)
            if keep == 0:
                self.statistics = self.statistics.emptied(b)

    @_outside_inference_mode
    def select_rows(self, rows: Tensor) -> None:
        """Make row i a copy of old row rows[i], int64 on any device; pages are shared."""
        rows = rows.to(self.window.keys.device)
        order = rows.tolist()
        self.window.select(rows)
        self.table.select(order)
        self.statistics = self.statistics.selected(rows, order)

    @_outside_inference_mode
    def copied(self, share: bool) -> LayerStore:
        """A store with the same content; encoded pages are shared or copied, everything else is copied."""
        new = copy.copy(self)
        new.table = self.table.copied(share)
        new.pool = new.table.pool
        new.window = copy.deepcopy(self.window)
        new.statistics = self.statistics.copied()
        return new

    def memory(self) -> Memory:
        """Bytes this layer holds; pages that it shares with forks count in each of them."""
        return memory_of(self.pool, self.table, self.window, self.statistics)
