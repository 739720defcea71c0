"""The kernels as implementations of the package's operators on CUDA tensors.

Calls the kernels do not serve run the reference implementation on the same device: the paper
preset, other page sizes and head dimensions, sparse attention of several new queries at once. So
do all calls where the kernels are unavailable (no cuda-core, a GPU below compute capability 8.0),
announced once.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from torch import Tensor

from ...codec import PageFormat
from .. import reference
from .decode import sparse_decode as kernel_decode
from .decode import supported as decode_supported
from .dense import dense_attend as kernel_dense
from .dense import supported as dense_supported
from .encode import encode as kernel_encode
from .encode import supported as encode_supported
from .loader import KernelsUnavailable
from .window import supported as window_supported
from .window import window_attend as kernel_window


@cache
def announce(reason: str) -> None:
    """Say once that the slower implementation runs."""
    warnings.warn(
        f"selfindex runs its slower PyTorch implementation on the GPU: {reason}", RuntimeWarning, stacklevel=2
    )


def encode(
    keys: Tensor, values: Tensor, counts: Tensor, constants: Tensor, format: str
) -> tuple[Tensor, Tensor]:
    """`selfindex::encode` on CUDA tensors."""
    if encode_supported(keys, values, PageFormat.parse(format)):
        try:
            return kernel_encode(keys, values, counts, constants, format)
        except KernelsUnavailable as error:
            announce(str(error))
    return reference.encode(keys, values, counts, constants, format)


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
    """`selfindex::sparse_decode` on CUDA tensors."""
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
    if decode_supported(query, index_pool, block_table, width, PageFormat.parse(format)):
        try:
            return kernel_decode(*arguments)
        except KernelsUnavailable as error:
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
    """`selfindex::dense_attend` on CUDA tensors."""
    arguments = (query, index_pool, payload_pool, block_table, page_counts, constants, scaling, format)
    if dense_supported(query, index_pool, block_table, PageFormat.parse(format)):
        try:
            return kernel_dense(*arguments)
        except KernelsUnavailable as error:
            announce(str(error))
    return reference.dense_attend(*arguments)


def window_attend(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    part: Tensor,
    part_lse: Tensor,
    sink_logit: Tensor | None,
    scaling: float,
) -> Tensor:
    """`selfindex::window_attend` on CUDA tensors."""
    arguments = (query, new_keys, new_values, keys, values, lengths, part, part_lse, sink_logit, scaling)
    if window_supported(query, new_keys, new_values, keys, values):
        try:
            return kernel_window(*arguments)
        except KernelsUnavailable as error:
            announce(str(error))
    return reference.window_attend(*arguments)


def register(ops: Any) -> None:
    """Make these the CUDA implementations of the operators in module `ops`."""
    ops.encode.register_kernel("cuda", encode)
    ops.sparse_decode.register_kernel("cuda", sparse_decode)
    ops.dense_attend.register_kernel("cuda", dense_attend)
    ops.window_attend.register_kernel("cuda", window_attend)
