"""`sparse_decode` over a payload plane in host memory: what is not on the GPU is fetched before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from .decode import Decode
from .loader import load
from .recent import RecentParams

FETCH_TOKENS = 32
"""Selected tokens a block of the fetching kernel takes, as in fetch.cuh."""


class OffloadedDecode(Decode):
    """A prepared call whose attention finds recently selected tokens on the GPU; see `Recent.tensor`."""

    def __init__(self, recent: Tensor, query: Tensor, *rest: Any) -> None:
        super().__init__(query, *rest)
        fmt = PageFormat.parse(rest[-1])
        self.kernels = self.kernels | load(
            "offloaded", query.device, fmt.head_dim, self.groups, fmt.value_bits, query.dtype
        )
        self._place = torch.empty(self.rows * self.params.width, dtype=torch.int32, device=query.device)
        self._arguments = [self.params, RecentParams.of(recent, self._place, fmt)]
        self._recent = recent  # kept alive, as `inputs`

    def run(self, stages: tuple[str, ...] = ("decode", "fetch", "attend")) -> tuple[Tensor, Tensor]:
        """Launch the kernels; `stages` leaves some out."""
        super().run(tuple(stage for stage in stages if stage == "decode"))
        with torch.cuda.device(self.output.device):
            if "fetch" in stages:
                grid = -(-self.params.width // FETCH_TOKENS), self.rows
                overlap = self.modern and not self.plan.scratch  # as attention after `decode`
                self.kernels["fetch"](grid, 256, self._arguments, overlap=overlap)
            if "attend" in stages:
                self.kernels["attend"](
                    (self.splits, self.rows), self.attend_threads, self._arguments, overlap=self.modern
                )
                self._merge()
        return self.output, self.lse


def prepared(*arguments: Any) -> Decode:
    """A call of `sparse_decode` on a GPU, wherever the payload plane is; arguments of the operator."""
    *stored, recent = arguments if len(arguments) > 10 else (*arguments, None)
    # Without room for recent tokens, attention reads all of them where they are.
    there = recent is not None and recent.numel() > 0
    return OffloadedDecode(recent, *stored) if there else Decode(*stored)


def sparse_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::sparse_decode` for a supported call; see `decode.sparse_decode`."""
    query, index, payload, table, counts, budgets, width, constants, *rest = arguments
    batch, heads, new, dim = query.shape
    if new == 1:
        return prepared(*arguments).run()

    def repeated(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, new, *x.shape[1:]).reshape(-1, *x.shape[1:])

    # Several new tokens select for themselves: rows of their own over the same pages.
    queries = query.transpose(1, 2).reshape(batch * new, heads, 1, dim)
    own = constants if constants.shape[0] == 1 else repeated(constants)
    rows = repeated(table), repeated(counts), repeated(budgets)
    output, lse = prepared(queries, index, payload, *rows, width, own, *rest).run()
    return output.view(batch, new, heads, dim).transpose(1, 2), lse.view(batch, new, heads).transpose(1, 2)
