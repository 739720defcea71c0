"""Self-indexing KV cache for long-context LLM inference.

A key is stored as sign codes and 2-bit magnitudes; the sign codes are the index that finds the few
percent of tokens a query attends to. See `SelfIndexCache`, `enable` and `generate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .config import SelfIndexConfig
from .errors import (
    ConfigError,
    DeviceError,
    FormatError,
    HostMemoryError,
    InputError,
    SelfIndexError,
    StateError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .codec import BalanceProfile
    from .integrations.transformers import SelfIndexCache, enable, generate
    from .report import Report
else:
    # PyTorch and transformers take seconds to import; the command line's help needs neither.
    _LATER = {
        "BalanceProfile": "codec",
        "Report": "report",
        "SelfIndexCache": "integrations.transformers",
        "enable": "integrations.transformers",
        "generate": "integrations.transformers",
    }

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "BalanceProfile",
    "ConfigError",
    "DeviceError",
    "FormatError",
    "HostMemoryError",
    "InputError",
    "Report",
    "SelfIndexCache",
    "SelfIndexConfig",
    "SelfIndexError",
    "StateError",
    "UnsupportedModelError",
    "enable",
    "generate",
]
