"""Self-indexing KV cache for long-context LLM inference.

A key is stored as sign codes and 2-bit magnitudes; the sign codes are the index that finds the few
percent of tokens a query attends to. See `SelfIndexCache`, `enable` and `generate`.
"""

from .codec import BalanceProfile
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
from .integrations.transformers import SelfIndexCache, enable, generate
from .report import Report

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
