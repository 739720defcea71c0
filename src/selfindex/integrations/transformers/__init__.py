"""Integration with Hugging Face transformers (5.17 and newer)."""

# ruff: noqa: E402  (the check comes before what it is about)
from ...versions import check_transformers

check_transformers()

from .cache import SelfIndexCache
from .enable import enable
from .generation import generate

__all__ = ["SelfIndexCache", "enable", "generate"]
