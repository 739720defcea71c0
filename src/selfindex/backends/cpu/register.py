"""The compiled operators as implementations of the package's operators on CPU tensors.

Calls they do not serve run the reference implementation. So do all calls where the compiled module is
missing, announced once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import reference
from ..fallback import with_fallback
from . import blocks, encode, operators, window
from .loader import NativeDisabled, NativeUnavailable

SERVED: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {
    "encode": (encode.encode, encode.encode_supported),
    "encode_into": (encode.encode_into, encode.encode_into_supported),
    "encode_paged": (encode.encode_paged, encode.encode_paged_supported),
    "prompt_statistics": (encode.prompt_statistics, encode.statistics_supported),
    "sparse_decode": (operators.sparse_decode, operators.attention_supported),
    "dense_attend": (operators.dense_attend, operators.attention_supported),
    "block_attend": (blocks.block_attend, blocks.supported),
    "step_attend": (window.step_attend, window.step_supported),
    "window_attend": (window.window_attend, window.window_supported),
    "paged_window_attend": (window.paged_window_attend, window.paged_window_supported),
}
"""Compiled operators, and whether they serve given arguments."""


def register(serve: Callable[[str, str, Callable[..., Any]], None]) -> None:
    """Make these the CPU implementations of the operators: `serve(name, "cpu", function)`."""
    for name, (fast, supported) in SERVED.items():
        plain = getattr(reference, name)
        serve(name, "cpu", with_fallback("CPU", fast, plain, supported, NativeUnavailable, (NativeDisabled,)))
