"""The kernels as implementations of the package's operators on CUDA tensors.

Calls the kernels do not serve run the reference implementation on the same device: other page sizes and
head dimensions, sparse attention of many new queries at once. So do all calls where the kernels are
unavailable (no cuda-core, a GPU below compute capability 8.0, a driver or compiler that refuses),
announced once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...codec import PageFormat
from .. import reference
from ..fallback import with_fallback
from . import balance, blocks, decode, dense, encode, join, offloaded, pages, statistics, window
from .launch import KernelsUnavailable


def register(serve: Callable[[str, str, Callable[..., Any]], None]) -> None:
    """Make these the CUDA implementations of the operators: `serve(name, "cuda", function)`."""
    served: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {
        "encode": (
            encode.encode,
            lambda keys, values, counts, constants, format: encode.supported(
                keys, values, PageFormat.parse(format)
            ),
        ),
        "encode_into": (
            encode.encode_into,
            lambda keys, values, counts, blocks, *rest: encode.supported(
                keys, values, PageFormat.parse(rest[-1]), rest[:2]
            ),
        ),
        "encode_paged": (
            encode.encode_paged,
            lambda window, table, first, counts, blocks, *rest: encode.supported(
                window, window, PageFormat.parse(rest[-1]), rest[:2]
            ),
        ),
        "prompt_statistics": (statistics.prompt_statistics, statistics.supported),
        "sparse_decode": (
            offloaded.sparse_decode,
            lambda query, index, payload, table, counts, budgets, width, *rest: decode.supported(
                query, index, payload, table, width, PageFormat.parse(rest[2])
            ),
        ),
        "dense_attend": (
            dense.dense_attend,
            lambda query, index, payload, table, *rest: dense.supported(
                query, index, payload, table, PageFormat.parse(rest[-1])
            ),
        ),
        "decode_pages": (
            pages.decode_pages,
            lambda index, payload, table, counts, starts, keys, values, *rest: pages.supported(
                index, payload, table, keys, values, PageFormat.parse(rest[-1])
            ),
        ),
        "merge_into": (join.merge_into, lambda *arguments: join.supported(*arguments)),
        "window_attend": (
            window.window_attend,
            lambda query, new_keys, new_values, keys, values, *rest: window.supported(
                query, new_keys, new_values, keys, values
            ),
        ),
        "block_attend": (blocks.block_attend, blocks.supported),
        "measure_balance": (
            balance.measure_balance,
            lambda query, keys, *rest: balance.supported(query, keys),
        ),
        "paged_window_attend": (
            window.paged_window_attend,
            lambda query, new_keys, new_values, held, *rest: window.paged_supported(
                query, new_keys, new_values, held
            ),
        ),
    }
    for name, (fast, supported) in served.items():
        plain = getattr(reference, name)
        serve(name, "cuda", with_fallback("GPU", fast, plain, supported, KernelsUnavailable))
