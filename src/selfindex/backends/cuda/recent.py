"""Payload of recently selected tokens on the GPU, for pools whose payload plane is in host memory.

A decode step selects mostly what the steps before it selected (evals/reuse.py), and only what is not
here has to cross the bus. The kernels are fetch.cuh, which fills and looks up, and attend.cuh.
"""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor

from ...codec import PageFormat
from ...codec.format import PAPER_GROUP
from .decode import HEAD_DIMS, PAGE_SIZE

WAYS = 8
"""As in fetch.cuh."""
SELECTIONS = 4
"""Entries, in selections of one step: 4 leave a fifth of the misses that 1 would (evals/reuse.py).
With 0 attention reads all tokens where they are."""
HEADER, WORD = 16, 8
"""Bytes of the clock and the count of what was fetched, and of an entry's name."""


class RecentParams(ctypes.Structure):
    """`struct Recent` of fetch.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ways", "data", "scales", "clock", "fetched", "place")),
        ("sets", ctypes.c_int),
    )

    @staticmethod
    def of(recent: Tensor, place: Tensor, fmt: PageFormat) -> RecentParams:
        """Kernel argument for `Recent.tensor`; place: int32 [rows, width], where the kernels meet."""
        entries, start = _entries(recent, fmt), recent.data_ptr()
        ways = start + HEADER
        data = ways + WORD * entries
        scales, sets = data + _entry_bytes(fmt) * entries, entries // (fmt.kv_heads * WAYS)
        return RecentParams(ways, data, scales, start, start + 8, place.data_ptr(), sets)


def _entry_bytes(fmt: PageFormat) -> int:
    """Of a token's magnitudes and values; paper: and of its scales and zero points."""
    token = fmt.payload.sections["magnitudes"].stride
    assert token is not None
    if fmt.preset == "paper":
        token += 4 * 2 * -(-fmt.head_dim // PAPER_GROUP)
    return -(-token // 16) * 16


def _scale_bytes(fmt: PageFormat) -> int:
    """Of a token's value scale, which lie in an array of their own."""
    return 0 if fmt.preset == "paper" else 1


def _entries(recent: Tensor, fmt: PageFormat) -> int:
    return max(0, recent.numel() - HEADER) // (WORD + _entry_bytes(fmt) + _scale_bytes(fmt))


class Recent:
    """A set-associative cache of single tokens of one pool, one part a KV head.

    It is one tensor, so that it can be passed to `sparse_decode`: the clock, the count of fetched tokens,
    then the name of every entry, all their magnitudes and values, all their value scales (paper: what
    groups of channels share is part of an entry). What it holds never changes a result.

    Attributes:
        tensor: uint8 [nbytes], empty as long as there is no room for any token.
    """

    def __init__(self, fmt: PageFormat, device: torch.device) -> None:
        self._format = fmt
        with torch.inference_mode(False):
            self._header = torch.zeros(HEADER, dtype=torch.uint8, device=device)
        # Swapped as one: forks of a cache may share it from several threads.
        self.tensor = self._header[:0]
        self._most = sys.maxsize

    @staticmethod
    def serves(fmt: PageFormat) -> bool:
        """Whether there are kernels that use it for such pages."""
        return fmt.page_size == PAGE_SIZE and fmt.head_dim in HEAD_DIMS

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes + self._header.nbytes

    @property
    def address(self) -> int:
        """Changes when a captured graph would look in the wrong place."""
        return self.tensor.data_ptr()

    @property
    def fetched(self) -> int:
        """Tokens of single KV heads that came over the bus for decode steps; waits for the GPU."""
        return int(self._current_header()[8:].view(torch.int64))

    def _current_header(self) -> Tensor:
        return self.tensor[:HEADER] if self.tensor.numel() else self._header

    def fit(self, selected: int, tokens: int) -> None:
        """Have room for steps that select `selected` tokens a KV head out of `tokens` in the pool."""
        wanted = -(-int(min(SELECTIONS * selected, tokens)) // WAYS)
        capturing = self.tensor.is_cuda and torch.cuda.is_current_stream_capturing()
        if wanted <= self.sets or wanted >= self._most or capturing:
            return
        # A little more, since a fractional budget grows with every step.
        sets = wanted + wanted // 8
        entries = self._format.kv_heads * sets * WAYS
        if entries >= 1 << 31:  # the kernels' places are int32
            return
        # Decode steps run in inference mode, `forget` does not.
        with torch.inference_mode(False):
            self._header = self._current_header().clone()
            # The old one goes first: together they may not fit.
            self.tensor = self._header[:0]
            try:
                one = WORD + _entry_bytes(self._format) + _scale_bytes(self._format)
                grown = self._header.new_empty(HEADER + entries * one)
            except torch.OutOfMemoryError:
                # It only makes steps faster, and they are to run where memory is short.
                self._most = wanted
                return
            grown[:HEADER] = self._header
            grown[HEADER : HEADER + WORD * entries] = 0xFF  # -1, the name of nobody
            self.tensor = grown

    @property
    def sets(self) -> int:
        """Sets of entries a KV head; 0 before the first `fit`."""
        return _entries(self.tensor, self._format) // (self._format.kv_heads * WAYS)

    def forget(self, blocks: list[int]) -> None:
        """Drop the tokens of blocks whose content changes."""
        if blocks and self.sets:
            # An entry is block, place in its page of PAGE_SIZE = 2^7 tokens, step of 32 bits; -1 is empty.
            changed = torch.tensor(blocks, device=self.tensor.device)
            ways = self.ways
            ways.masked_fill_(torch.isin(ways >> 39, changed), -1)

    @property
    def ways(self) -> Tensor:
        """Names of the entries, int64 [KV heads x sets x WAYS]."""
        end = HEADER + WORD * _entries(self.tensor, self._format)
        return self.tensor[min(HEADER, end) : end].view(torch.int64)
