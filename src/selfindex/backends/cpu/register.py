"""The compiled operators as implementations of the package's operators on CPU tensors.

Calls they do not serve run the reference implementation: the paper preset, encoding, many new
queries at once. So do all calls where the compiled module is missing, announced once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...codec import PageFormat
from .. import reference
from ..fallback import with_fallback
from . import operators
from .loader import NativeDisabled, NativeUnavailable

FEW_ROWS = 64
"""Queries of a KV head up to which attention to everything runs compiled; beyond, matrix products win."""


def _any(query: Tensor, index_pool: Tensor, payload_pool: Tensor, *rest: Any) -> bool:
    return operators.supported(query, index_pool, payload_pool, PageFormat.parse(rest[-1]))


def _few(query: Tensor, index_pool: Tensor, payload_pool: Tensor, *rest: Any) -> bool:
    rows = query.shape[1] // PageFormat.parse(rest[-1]).kv_heads * query.shape[2]
    return rows <= FEW_ROWS and _any(query, index_pool, payload_pool, *rest)


def register(ops: Any) -> None:
    """Make these the CPU implementations of the operators in module `ops`."""
    for name, supported in (("sparse_decode", _any), ("dense_attend", _few)):
        fast, plain = getattr(operators, name), getattr(reference, name)
        getattr(ops, name).register_kernel(
            "cpu", with_fallback("CPU", fast, plain, supported, NativeUnavailable, (NativeDisabled,))
        )
