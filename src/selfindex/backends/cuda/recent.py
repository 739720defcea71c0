"""Payload of recently selected tokens on the GPU, for pools whose payload plane is in host memory.

A decode step selects mostly what the steps before it selected (evals/reuse.py), and only what is not
here has to cross the bus. The kernels are fetch.cuh, which fills and looks up, and attend.cuh.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from functools import partial

import torch
from torch import Tensor

from ...codec import PageFormat

WAYS = 8
"""As in fetch.cuh."""
SELECTIONS = 4
"""Entries, in selections of one step: 4 leave a fifth of the misses that 1 would (evals/reuse.py).
With 0 attention reads all tokens where they are."""


class RecentParams(ctypes.Structure):
    """`struct Recent` of fetch.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ways", "data", "scales", "clock", "fetched", "place")),
        ("sets", ctypes.c_int),
    )
    buffers: tuple[Tensor, ...]


_known: weakref.WeakValueDictionary[int, Recent] = weakref.WeakValueDictionary()


class Recent:
    """A set-associative cache of single tokens of one pool, one part a KV head.

    What it holds never changes a result, so it is found by the pool's address and not passed
    through the operators.

    Args:
        payload: the pool's payload plane; stays at its address.
    """

    def __init__(self, fmt: PageFormat, payload: Tensor) -> None:
        self._format, self._device = fmt, payload.device
        empty = payload.new_empty(0)
        # Swapped as one: forks of a cache may share it from several threads.
        self._buffers = empty, empty, empty
        self._clock = torch.zeros(2, dtype=torch.int32, device=payload.device)
        self._fetched = torch.zeros(1, dtype=torch.long, device=payload.device)
        self._most = sys.maxsize
        _known[payload.data_ptr()] = self

    @staticmethod
    def of(payload: Tensor) -> Recent | None:
        """The cache of a payload plane, None if there is none."""
        return _known.get(payload.data_ptr())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self._buffers, self._clock, self._fetched))

    @property
    def address(self) -> int:
        """Changes when a captured graph would look in the wrong place."""
        return self._buffers[0].data_ptr()

    @property
    def fetched(self) -> int:
        """Tokens of single KV heads that came over the bus for decode steps; waits for the GPU."""
        return int(self._fetched)

    def fit(self, selected: int, tokens: int) -> None:
        """Have room for steps that select `selected` tokens a KV head out of `tokens` in the pool."""
        wanted = -(-int(min(SELECTIONS * selected, tokens)) // WAYS)
        capturing = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if wanted <= self.sets or wanted >= self._most or capturing:
            return
        # A little more, since a fractional budget grows with every step.
        sets = wanted + wanted // 8
        entries = self._format.kv_heads * sets * WAYS
        if entries >= 1 << 31:  # the kernels' places are int32
            return
        token = self._format.payload.sections["magnitudes"].stride
        assert token is not None
        entry = -(-token // 16) * 16
        # Decode steps run in inference mode, `forget` does not.
        with torch.inference_mode(False):
            empty = partial(torch.empty, dtype=torch.uint8, device=self._device)
            # The old ones go first: together they may not fit.
            self._buffers = empty(0), empty(0), empty(0)
            try:
                ways = torch.full((entries,), -1, dtype=torch.long, device=self._device)
                self._buffers = ways, empty(entries * entry), empty(entries)
            except torch.OutOfMemoryError:
                # It only makes steps faster, and they are to run where memory is short.
                self._most = wanted

    @property
    def sets(self) -> int:
        """Sets of entries a KV head; 0 before the first `fit`."""
        return self._buffers[0].numel() // (self._format.kv_heads * WAYS)

    def forget(self, blocks: list[int]) -> None:
        """Drop the tokens of blocks whose content changes."""
        if blocks and self.sets:
            # An entry is block, place in its page of PAGE_SIZE = 2^7 tokens, step of 32 bits; -1 is empty.
            changed = torch.tensor(blocks, device=self._device)
            ways = self._buffers[0]
            ways.masked_fill_(torch.isin(ways >> 39, changed), -1)

    def params(self, place: int) -> RecentParams:
        """Kernel argument, which keeps the buffers alive; `place` is the address of int32 [rows, width]."""
        buffers = ways, data, scales = self._buffers
        params = RecentParams(
            ways=ways.data_ptr(),
            data=data.data_ptr(),
            scales=scales.data_ptr(),
            clock=self._clock.data_ptr(),
            fetched=self._fetched.data_ptr(),
            place=place,
            sets=ways.numel() // (self._format.kv_heads * WAYS),
        )
        params.buffers = buffers
        return params
