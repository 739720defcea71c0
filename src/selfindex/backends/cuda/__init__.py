"""CUDA kernels, compiled at first use. `register` puts them behind the package's operators."""

from .register import register

__all__ = ["register"]
