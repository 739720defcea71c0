"""Storage: block pools, block tables, full-precision tokens, and one store per layer."""

from .layer import LayerStore
from .memory import Memory

__all__ = ["LayerStore", "Memory"]
