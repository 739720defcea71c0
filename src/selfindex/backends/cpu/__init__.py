"""The compiled CPU backend: the index as a byte shuffle."""

from .register import register

__all__ = ["register"]
