"""A pool of fixed-size blocks, each holding one encoded page of one layer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..backends import ops
from ..backends.cuda.recent import Recent
from ..codec import PageFormat
from ..errors import StateError
from .host import HostRows


@dataclass(frozen=True)
class Part:
    """Keys and values that become pages.

    Attributes:
        keys, values: [n, H, P, d].
        counts: tokens of each page.
        constants: see `Codec`.
    """

    keys: Tensor
    values: Tensor
    counts: list[int]
    constants: Tensor

    @classmethod
    def of_row(cls, keys: Tensor, values: Tensor, counts: list[int], page: int, constants: Tensor) -> Part:
        """Tokens [H, n, d] of a row in pages of so many, the last one possibly short."""
        missing = -keys.shape[1] % page
        if missing:
            keys, values = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (keys, values))
        paged = [x.unflatten(1, (-1, page)).transpose(0, 1) for x in (keys, values)]
        return cls(paged[0], paged[1], counts, constants)

    @property
    def tokens(self) -> Tensor:
        """The counts where the keys are, int32 [n]."""
        page, device = self.keys.shape[2], self.keys.device
        if min(self.counts) == page:  # as a rule: nothing has to be copied to a GPU
            return _constant(page, _rounded(len(self.counts)), device)[: len(self.counts)]
        return torch.tensor(self.counts, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Encoded:
    """Encoded pages that a pool does not count yet.

    Attributes:
        parts: what they were encoded from.
        blocks: where they are, as long as it is the pool's turn `turn`.
        planes: the pages themselves, of a pool whose payload is in host memory.
    """

    parts: Sequence[Part]
    blocks: list[int] = field(default_factory=list)
    turn: int = 0
    planes: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class BlockPool:
    """Index and payload planes of pages, in two tensors so that they can live apart.

    Blocks are written once and then only read. A block may be in the tables of several rows
    (beams, shared prefixes) and of several stores (forks), which may run in threads of their own;
    it is free again when the last of them lets go.

    The garbage collector may run a finaliser, and a signal its handler, between any two steps of what
    is done here. `release` is all that they may call: it only takes a note, which the next call reads.
    Other calls out of the middle of one raise StateError.

    Args:
        device: of both planes.
        offloading: keep the payload plane in host memory, where the device reads it.

    Attributes:
        index: uint8 [capacity, format.index_bytes].
        payload: uint8 [capacity, format.payload_bytes], a tensor of `device` wherever its bytes are.
        recent: tokens of an offloaded payload plane that the GPU keeps as well.
    """

    def __init__(self, fmt: PageFormat, device: torch.device, offloading: bool = False) -> None:
        self.format = fmt
        self.index = torch.empty(0, fmt.index_bytes, dtype=torch.uint8, device=device)
        self._host = HostRows(fmt.payload_bytes, device) if offloading else None
        self.payload = torch.empty(0, fmt.payload_bytes, dtype=torch.uint8, device=device)
        needed = offloading and device.type == "cuda" and Recent.serves(fmt)
        self.recent = Recent(fmt, device) if needed else None
        self._references: list[int] = []
        self._free: list[int] = []
        self._released: deque[list[int]] = deque()
        self._turn = 0
        """Changes when blocks that are free are written to or taken."""
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPool:
        """A pool with the same pages under the same ids, in the same kind of memory."""
        new = BlockPool(self.format, self.index.device, self.offloading)
        memo[id(self)] = new
        with self._alone():
            self._settle()
            new.index, new.payload = new._resized(self.capacity)
            new.index.copy_(self.index)
            if self._host is None or new._host is None:
                new.payload.copy_(self.payload)
            else:
                self._host.synchronize()
                new._host.write(list(range(self.capacity)), self._host.host)
            new._references, new._free = list(self._references), list(self._free)
        return new

    @property
    def offloading(self) -> bool:
        """Whether the payload plane is in host memory."""
        return self._host is not None

    @property
    def capacity(self) -> int:
        return self.index.shape[0]

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        if not self._is_busy():
            with self._lock:
                self._settle()
        return self.capacity - len(self._free)

    def add(self, index: Tensor, payload: Tensor) -> list[int]:
        """Store encoded pages, one row each and of any device, with one reference.

        Returns:
            their block ids.
        """
        with self._alone():
            blocks = self._next(index.shape[0])
            self._fill(blocks, index, payload)
            self._take(blocks)
        return blocks

    def encode(self, parts: Sequence[Part]) -> Encoded:
        """Encode pages into the blocks that are taken next; they are taken by `add_encoded`.

        Until then they are free, and nothing has to be undone where they are not wanted after all.
        """
        if self._host is None:
            with self._alone():
                return self._encode(parts)
        # A GPU would write to host memory a few bytes at a time: one copy follows.
        planes = [ops.encode(x.keys, x.values, x.tokens, x.constants, self.format.name) for x in parts]
        self.reserve(sum(len(index) for index, _ in planes))
        return Encoded(parts, planes=planes)

    def add_encoded(self, encoded: Encoded) -> list[int]:
        """Store what `encode` has encoded, with one reference each.

        Returns:
            their block ids, in the order of the parts.
        """
        if encoded.planes:
            return [block for planes in encoded.planes for block in self.add(*planes)]
        with self._alone():
            if encoded.turn != self._turn:
                # Another thread's cache that shares the pool has used the blocks since.
                encoded = self._encode(encoded.parts)
            self._take(encoded.blocks)
        return encoded.blocks

    def _encode(self, parts: Sequence[Part]) -> Encoded:
        self._turn += 1
        blocks = self._next(sum(len(x.counts) for x in parts))
        start = 0
        for part in parts:
            end = start + len(part.counts)
            at = _blocks_on(blocks[start:end], self.index.device)
            tokens = part.keys, part.values, part.tokens
            ops.encode_into(*tokens, at, self.index, self.payload, part.constants, self.format.name)
            start = end
        return Encoded(parts, blocks, self._turn)

    def read(self, blocks: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Copies of pages on a device: (index, payload), one row a block."""
        at = torch.tensor(blocks, dtype=torch.long, device=self.index.device)
        index = self.index[at].to(device)
        if self._host is not None:
            return index, self._host.read(blocks, device)
        return index, self.payload[at].to(device)

    def recent_tokens(self, selected: int) -> Tensor | None:
        """What `sparse_decode` gets to keep recent tokens in, with room for steps of `selected` a KV head."""
        if self.recent is None:
            return None
        self.recent.fit(selected, self.capacity * self.format.page_size)
        return self.recent.tensor

    def references(self, block: int) -> int:
        """How many rows, of all tables over this pool, hold a block."""
        if self._released and not self._is_busy():
            with self._lock:
                self._settle()
        return self._references[block]

    def retain(self, blocks: Iterable[int]) -> None:
        """Count one more table that holds these blocks."""
        with self._alone():
            self._settle()
            for block in blocks:
                self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Count one table fewer from the next call on; a block nobody holds becomes free.

        May be called at any moment, by a finaliser as well: it takes no lock and changes no count.
        """
        self._released.append(list(blocks))

    def hold_only(self, blocks: Iterable[int]) -> None:
        """Count one holder for every time a block occurs in `blocks`; all others become free."""
        references = [0] * self.capacity
        for block in blocks:
            references[block] += 1
        self._references, self._free = references, self._unheld(references)

    def reserve(self, count: int) -> None:
        """Make room for `count` more pages, so that adding them moves nothing."""
        with self._alone():
            self._make_room(count)

    def _is_busy(self) -> bool:
        """Whether this thread is in the middle of a call."""
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]  # as threading.Condition does

    def _alone(self) -> threading.RLock:
        """The lock, for a call that reads the free list and the planes more than once.

        Raises:
            StateError: this thread is in the middle of such a call.
        """
        if self._is_busy():
            raise StateError(
                "a signal handler or a finaliser uses pages in the middle of another call that stores "
                "some; let it only take a note, and act when that call is over"
            )
        return self._lock

    def _settle(self) -> None:
        """Count what was released. Cut short, blocks stay in use; they are never free too early."""
        while self._released:
            for block in self._released.popleft():
                self._references[block] -= 1
                if self._references[block] == 0:
                    self._free.append(block)

    @staticmethod
    def _unheld(references: list[int]) -> list[int]:
        """Blocks without a holder, in an order that hands out ascending ids: a prompt's pages are one run."""
        return [b for b in range(len(references) - 1, -1, -1) if not references[b]]

    def _next(self, count: int) -> list[int]:
        """The blocks that are taken next, still free."""
        self._make_room(count)
        return self._free[-count:][::-1] if count else []

    def _take(self, blocks: list[int]) -> None:
        """Take free blocks, once they are written: what failed before that has cost nothing."""
        self._turn += 1
        start = len(self._free) - len(blocks)
        if self._free[start:] == blocks[::-1]:
            del self._free[start:]
        else:  # others have become free since these were the next
            taken = set(blocks)
            self._free = [block for block in self._free if block not in taken]
        for block in blocks:
            self._references[block] = 1

    def _fill(self, blocks: list[int], index: Tensor, payload: Tensor) -> None:
        """Write encoded pages, of any device, to blocks."""
        if self._host is None:
            self._put(blocks, (self.index, index), (self.payload, payload))
        else:
            self._put(blocks, (self.index, index))
            if self.recent is not None:
                self.recent.forget(blocks)
            self._host.write(blocks, payload)

    def _make_room(self, count: int) -> None:
        self._settle()
        missing = count - len(self._free)
        if missing <= 0:
            return
        # A sixteenth more than needed: copying stays O(1) per page, slack stays under 6.25 %.
        old = self.capacity
        index, payload = self._resized(old + missing + old // 16)
        references = self._references + [0] * (index.shape[0] - old)
        # From the counts: finds blocks again that a call cut short has taken off the list.
        free = self._unheld(references)
        # One statement: no interrupt comes in between.
        self.index, self.payload, self._references, self._free = index, payload, references, free

    def _resized(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Planes with room for `capacity` pages or a few more; those there are keep their bytes."""
        old = self.capacity
        if self._host is not None:
            self._host.grow(capacity)
            capacity = self._host.capacity
        index = self.index.new_empty(capacity, self.index.shape[1])
        if self._host is not None:
            payload = self._host.data
        else:
            payload = self.payload.new_empty(capacity, self.payload.shape[1])
        if old:
            index[:old] = self.index
            if self._host is None:
                payload[:old] = self.payload
        return index, payload

    @staticmethod
    def _put(blocks: list[int], *planes: tuple[Tensor, Tensor]) -> None:
        """Write pages, of any device, to blocks of planes: (plane, pages) pairs."""
        # One copy where the blocks lie together, as those of a prompt and of a loaded prefix do.
        run = _run(blocks)
        together = run is not None
        at: Any = run
        if not together:
            at = torch.tensor(blocks, dtype=torch.long, device=planes[0][0].device)
        for plane, pages in planes:
            plane[at] = pages if together else pages.to(plane.device)


def _run(blocks: list[int]) -> slice | None:
    """The blocks as a slice, if each follows the one before."""
    start, end = (blocks[0], blocks[0] + len(blocks)) if blocks else (0, 0)
    return slice(start, end) if blocks == list(range(start, end)) else None


def _blocks_on(blocks: list[int], device: torch.device) -> Tensor:
    """int32 [n] on a device; a GPU need not wait for those that follow each other."""
    run = _run(blocks)
    if run is None:
        return torch.tensor(blocks, dtype=torch.int32, device=device)
    return _ascending(_rounded(run.stop), device)[run]


def _rounded(count: int) -> int:
    """A power of two, so that few tensors are kept."""
    return 1 << max(10, (count - 1).bit_length())


@lru_cache(maxsize=64)
def _ascending(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _constant(number: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((count,), number, dtype=torch.int32, device=device)
