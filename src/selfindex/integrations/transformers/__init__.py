"""Integration with Hugging Face transformers (5.17 and newer)."""

from .cache import SelfIndexCache
from .enable import enable
from .generation import generate

__all__ = ["SelfIndexCache", "enable", "generate"]
