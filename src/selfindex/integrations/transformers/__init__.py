"""Integration with Hugging Face transformers (5.17 and newer)."""

from .cache import SelfIndexCache
from .decoding import generate
from .enable import enable

__all__ = ["SelfIndexCache", "enable", "generate"]
