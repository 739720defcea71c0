"""What a cache holds and reads, for people and programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .backends.cpu.loader import scratch
from .store import LayerStore, Memory


@dataclass(frozen=True)
class LayerReport:
    """One layer of a `Report`.

    Attributes:
        tokens: tokens held, summed over the batch.
        encoded: how many of them are encoded.
        read: tokens attended by the last step, per query and KV head, summed over the batch.
        memory: bytes by kind.
        dense_bytes: bytes of the same tokens as 16-bit keys and values.
    """

    layer: int
    tokens: int
    encoded: int
    read: int
    memory: Memory
    dense_bytes: int

    @classmethod
    def of(cls, layer: int, store: LayerStore, read: list[int]) -> LayerReport:
        """Describe a store; `read` is what `attend` returned last."""
        tokens = sum(store.length(b) for b in range(store.batch))
        encoded = sum(store.encoded(b) for b in range(store.batch))
        fmt = store.format
        return cls(
            layer=layer,
            tokens=tokens,
            encoded=encoded,
            read=(sum(read) if read else encoded) + sum(store.raw.lengths),
            memory=store.memory(),
            dense_bytes=tokens * fmt.kv_heads * fmt.head_dim * 4,
        )


@dataclass(frozen=True)
class Report:
    """Memory and traffic of a cache; `str()` is a readable summary."""

    preset: str
    layers: list[LayerReport]

    @property
    def memory(self) -> Memory:
        """Bytes by kind over all compressed layers."""
        return sum((layer.memory for layer in self.layers), Memory())

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same tokens take as 16-bit keys and values."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller than 16-bit keys and values, everything included."""
        return self.dense_bytes / self.memory.total if self.memory.total else 1.0

    @property
    def read_fraction(self) -> float:
        """Share of the held tokens that the last step attended."""
        held = sum(layer.tokens for layer in self.layers)
        return sum(layer.read for layer in self.layers) / held if held else 1.0

    @property
    def scratch(self) -> int:
        """Bytes of working memory that the process keeps for all caches; not part of `memory`."""
        return scratch()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers."""
        derived = {"ratio": self.ratio, "read_fraction": self.read_fraction, "scratch": self.scratch}
        return asdict(self) | derived

    def __str__(self) -> str:
        memory, layers = self.memory, self.layers
        if not layers:
            return f"self-indexing KV cache ({self.preset}): empty"
        tokens, read = layers[0].tokens, [layer.read for layer in layers]
        mib = 1 / 2**20
        held = []
        if memory.host:
            held = [
                f"         {memory.host * mib:.2f} MiB of it in host memory, {memory.recent * mib:.2f} MiB "
                "of recently read tokens kept on the GPU as well"
            ]
        return "\n".join(
            [
                f"self-indexing KV cache ({self.preset}): {tokens} tokens in {len(layers)} layers, "
                f"{layers[0].encoded} encoded",
                f"memory   {memory.total * mib:.2f} MiB, {self.ratio:.2f}x smaller than 16 bit "
                f"({self.dense_bytes * mib:.2f} MiB)",
                f"         index {memory.index * mib:.2f}, payload {memory.payload * mib:.2f}, "
                f"full precision {memory.full_precision * mib:.2f}, "
                f"statistics {memory.statistics * mib:.2f}, slack {memory.slack * mib:.2f} MiB",
                *held,
                f"read     {min(read)} to {max(read)} tokens per head in the last step "
                f"({100 * self.read_fraction:.1f} %)",
            ]
        )
