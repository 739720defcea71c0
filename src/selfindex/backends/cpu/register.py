"""The compiled operators as implementations of the package's operators on CPU tensors.

Calls they do not serve run the reference implementation: the paper preset, encoding, many new
queries at once. So do all calls where the compiled module is missing, announced once.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from torch import Tensor

from ...codec import PageFormat
from .. import reference
from .loader import NativeDisabled, NativeUnavailable
from .operators import dense_attend as compiled_dense
from .operators import sparse_decode as compiled_decode
from .operators import supported

FEW_ROWS = 64
"""Queries of a KV head up to which attention to everything runs compiled; beyond, matrix products win."""


@cache
def announce(reason: str) -> None:
    """Say once that the slower implementation runs."""
    warnings.warn(
        f"selfindex runs its slower PyTorch implementation on the CPU: {reason}", RuntimeWarning, stacklevel=2
    )


def sparse_decode(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor,
    width: int,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """`selfindex::sparse_decode` on CPU tensors."""
    arguments = (
        query,
        index_pool,
        payload_pool,
        block_table,
        page_counts,
        budgets,
        width,
        constants,
        scaling,
        format,
    )
    if supported(query, index_pool, payload_pool, PageFormat.parse(format)):
        try:
            return compiled_decode(*arguments)
        except NativeDisabled:
            pass
        except NativeUnavailable as error:
            announce(str(error))
    return reference.sparse_decode(*arguments)


def dense_attend(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """`selfindex::dense_attend` on CPU tensors."""
    arguments = (query, index_pool, payload_pool, block_table, page_counts, constants, scaling, format)
    fmt = PageFormat.parse(format)
    few = query.shape[1] // fmt.kv_heads * query.shape[2] <= FEW_ROWS
    if few and supported(query, index_pool, payload_pool, fmt):
        try:
            return compiled_dense(*arguments)
        except NativeDisabled:
            pass
        except NativeUnavailable as error:
            announce(str(error))
    return reference.dense_attend(*arguments)


def register(ops: Any) -> None:
    """Make these the CPU implementations of the operators in module `ops`."""
    ops.sparse_decode.register_kernel("cpu", sparse_decode)
    ops.dense_attend.register_kernel("cpu", dense_attend)
