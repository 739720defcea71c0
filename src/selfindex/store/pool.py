"""A pool of fixed-size blocks, each holding one encoded page of one layer."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends.cuda.recent import Recent
from ..codec import PageFormat
from ..errors import StateError
from .host import HostRows


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
        count = index.shape[0]
        with self._alone():
            self._make_room(count)
            blocks = self._free[-count:][::-1] if count else []
            if self._host is None:
                self._put(blocks, (self.index, index), (self.payload, payload))
            else:
                self._put(blocks, (self.index, index))
                if self.recent is not None:
                    self.recent.forget(blocks)
                self._host.write(blocks, payload)
            # Taken once they are written: what failed before this line has cost nothing.
            del self._free[len(self._free) - count :]
            for block in blocks:
                self._references[block] = 1
        return blocks

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
        index[:old] = self.index
        if self._host is not None:
            payload = self._host.data
        else:
            payload = self.payload.new_empty(capacity, self.payload.shape[1])
            payload[:old] = self.payload
        return index, payload

    @staticmethod
    def _put(blocks: list[int], *planes: tuple[Tensor, Tensor]) -> None:
        """Write pages, of any device, to blocks of planes: (plane, pages) pairs."""
        run = range(blocks[0], blocks[0] + len(blocks)) if blocks else range(0)
        # One copy where the blocks lie together, as those of a prompt and of a loaded prefix do.
        together = blocks == list(run)
        at: Any = slice(run.start, run.stop)
        if not together:
            at = torch.tensor(blocks, dtype=torch.long, device=planes[0][0].device)
        for plane, pages in planes:
            plane[at] = pages if together else pages.to(plane.device)
