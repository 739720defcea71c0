"""What a cache holds and reads, for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .attention.missed import LastStep
from .backends.cpu.loader import scratch
from .store import LayerStore, Memory

MIB = 2**20


@dataclass(frozen=True)
class LayerReport:
    """One compressed layer of a `Report`.

    Attributes:
        tokens: tokens held, summed over the batch; padding is not held.
        encoded: how many of them are encoded.
        read: how many of them each KV head attended to in the last step (for the last of its new
            tokens, if there were several), summed over the batch. 0 after a crop, a load or a reset:
            no step has run on what is held now.
        row_tokens: tokens held, of each row.
        row_read: tokens read, of each row.
        missed: share of the last query's softmax mass on tokens that the step did not read, mean over rows
            and query heads; 0 if it read all. Estimated from decoded keys, 3 bits a channel. None if nobody
            knows it, see `Report.missed_unknown`.
        most_missed: largest share of a row and query head.
        row_missed: mean over the query heads of each row; [] if it is not known.
        memory: bytes by kind; the kept query of the last step is among the statistics.
        shared_bytes: how many of the index and payload bytes forks of this cache hold as well;
            the report of each of them counts these.
        dense_bytes: bytes of the same tokens as 16-bit keys and values, whatever the model's dtype.
        dtype: of the model's keys and values.
        own_dtype_bytes: bytes of the same tokens in this dtype, as a dense cache of the model holds them.
    """

    layer: int
    tokens: int
    encoded: int
    read: int
    row_tokens: list[int]
    row_read: list[int]
    missed: float | None
    most_missed: float | None
    row_missed: list[float]
    memory: Memory
    shared_bytes: int
    dense_bytes: int
    dtype: str
    own_dtype_bytes: int

    @classmethod
    def of(
        cls, layer: int, store: LayerStore, last: LastStep | None, missed: Tensor | None = None
    ) -> LayerReport:
        """Describe a store; `last`: its last step, if there was one; `missed`: what `missed_mass` finds."""
        rows, fmt, dtype = range(store.batch), store.format, store.window.keys.dtype
        held = [store.length(b) for b in rows]
        read = [n - left for n, left in zip(held, last.unread, strict=True)] if last else [0] * store.batch
        mass = [] if missed is None else missed.mean(1).tolist()
        query = Memory(statistics=0 if last is None else last.nbytes)
        numbers = 2 * sum(held) * fmt.kv_heads * fmt.head_dim
        own = Counter(block for row in store.table.rows for block in row.blocks)
        shared = sum(store.pool.references(block) > count for block, count in own.items())
        return cls(
            layer=layer,
            tokens=sum(held),
            encoded=sum(store.encoded(b) for b in rows),
            read=sum(read),
            row_tokens=held,
            row_read=read,
            missed=sum(mass) / len(mass) if mass else None,
            most_missed=None if missed is None else float(missed.max()),
            row_missed=mass,
            memory=store.memory() + query,
            shared_bytes=shared * (fmt.index_bytes + fmt.payload_bytes),
            dense_bytes=2 * numbers,
            dtype=str(dtype).removeprefix("torch."),
            own_dtype_bytes=dtype.itemsize * numbers,
        )


@dataclass(frozen=True)
class Report:
    """Memory and traffic of a cache; `str()` is a readable summary.

    Attributes:
        layers: those this cache compresses. All sums and ratios are over these.
        other_layers: layers with a window or a state of fixed size, which transformers keeps as always.
        other_bytes: bytes these hold, counted nowhere else.
        missed_unknown: why nobody knows what attention mass the last step missed; None if it is known.
    """

    preset: str
    layers: list[LayerReport]
    other_layers: int = 0
    other_bytes: int = 0
    missed_unknown: str | None = None

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
        """Share of the held tokens that the last step attended to; 0 if no step has run on them."""
        held = sum(layer.tokens for layer in self.layers)
        return sum(layer.read for layer in self.layers) / held if held else 1.0

    @property
    def missed(self) -> float | None:
        """Share of the attention mass that the last step missed, mean over layers; None if not known."""
        known = [layer.missed for layer in self.layers if layer.missed is not None]
        return sum(known) / len(known) if known else None

    @property
    def missed_text(self) -> str:
        """`missed` and the layer that missed most, for people."""
        known = [(layer.missed, layer.layer) for layer in self.layers if layer.missed is not None]
        if self.missed is None:
            return f"attention mass not known, {self.missed_unknown}"
        most, worst = max(known)
        return (
            f"attention mass of the last step: mean {100 * self.missed:.1f} %, "
            f"worst layer {worst}: {100 * most:.1f} %"
        )

    @property
    def scratch(self) -> int:
        """Bytes of working memory that the process keeps for all caches; not part of `memory`."""
        return scratch()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, lists and strings, which JSON can hold."""
        names = "ratio", "read_fraction", "missed", "scratch"
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        if not self.layers:
            return f"self-indexing KV cache ({self.preset}): empty"
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        memory, layers, first = self.memory, self.layers, self.layers[0]
        rows = f" ({len(first.row_tokens)} rows of {_span(first.row_tokens)})"
        yield (
            f"self-indexing KV cache ({self.preset}): {first.tokens} tokens in {len(layers)} layers"
            f"{rows if len(first.row_tokens) > 1 else ''}, {first.encoded} encoded"
        )
        own = sum(layer.own_dtype_bytes for layer in layers)
        factor = f"{self.ratio:.2f}x smaller" if self.ratio >= 1 else f"{1 / self.ratio:.2f}x larger"
        wider = f", {own / MIB:.2f} as {first.dtype}" * (own != self.dense_bytes)
        yield (
            f"memory   {memory.total / MIB:.2f} MiB, {factor} than 16 bit "
            f"({self.dense_bytes / MIB:.2f} MiB{wider})"
        )
        yield (
            f"         index {memory.index / MIB:.2f}, payload {memory.payload / MIB:.2f}, "
            f"full precision {memory.full_precision / MIB:.2f}, "
            f"statistics {memory.statistics / MIB:.2f}, slack {memory.slack / MIB:.2f} MiB"
        )
        if memory.host:
            yield (
                f"         {memory.host / MIB:.2f} MiB of it in host memory, {memory.recent / MIB:.2f} MiB "
                "of recently read tokens kept on the GPU as well"
            )
        shared = sum(layer.shared_bytes for layer in layers)
        if shared:
            yield f"         {shared / MIB:.2f} MiB of it shared with forks, whose reports count it too"
        if self.other_layers:
            yield (
                f"         and {self.other_bytes / MIB:.2f} MiB not counted above in {self.other_layers} "
                "layers that are not compressed"
            )
        read = [n for layer in layers for n in layer.row_read]
        if any(read):
            yield (
                f"read     {_span(read)} tokens per row and head in the last step "
                f"({100 * self.read_fraction:.1f} %)"
            )
        else:
            yield "read     nothing yet: no step has run on what is held now"
        if any(read):
            yield f"missed   {self.missed_text}"


def _span(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}"


def held_bytes(thing: Any) -> int:
    """Bytes of the tensors an object holds, in its attributes and in lists and dicts of them."""
    if isinstance(thing, Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return sum(map(held_bytes, thing.values()))
    if isinstance(thing, (list, tuple)):
        return sum(map(held_bytes, thing))
    return held_bytes(vars(thing)) if hasattr(thing, "is_initialized") else 0
