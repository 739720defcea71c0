"""The quantised caches of transformers, as its users get them, with the defaults for all but the bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..recording import Recording
from ..timing import out_of_memory

GROUP = 64
"""Numbers that share a scale and a zero point, of 16 bits each, by default."""


class Unavailable(Exception):
    """A method cannot run here; the message says why."""


@dataclass(frozen=True)
class LibraryCache:
    """`transformers.QuantizedCache`.

    Args:
        backend: "hqq", "quanto" or "fp8"; the first two need packages of their own.
        bits: None where the backend has no choice.
    """

    backend: str
    bits: int | None = None

    def make(self, model: Any, recording: Recording) -> Any:
        """A cache that holds a recorded prefix.

        Raises:
            Unavailable: the backend is not installed, or does not work with this model or device.
        """
        from transformers import QuantizedCache

        try:
            options: dict[str, Any] = {} if self.bits is None else {"nbits": self.bits}
            cache = QuantizedCache(self.backend, model.config, **options)
            layers: list[Any] = cache.layers
            for i, (_, keys, values, _) in zip(recording.layers, recording.tensors, strict=True):
                layers[i].update(keys, values)
        except Exception as error:  # of libraries that this project does not know
            if out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise Unavailable(reason) from error
        return cache

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes per cached token and KV head."""
        if self.bits is None:
            return 2 * head_dim
        return 2 * head_dim * (self.bits / 8 + 4 / GROUP)


LIBRARY = {
    "transformers HQQ 4": LibraryCache("hqq", 4),
    "transformers HQQ 2": LibraryCache("hqq", 2),
    "transformers quanto 4": LibraryCache("quanto", 4),
    "transformers quanto 2": LibraryCache("quanto", 2),
    "transformers fp8": LibraryCache("fp8"),
}
"""By name."""
