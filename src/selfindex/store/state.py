"""A layer store as plain tensors and numbers, and back: what is written to disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import SelfIndexConfig
from ..errors import FormatError
from .change import Statistics
from .layer import LayerStore

NAMES = ("index", "payload", "keys", "values", "query_square", "constants")


def export(store: LayerStore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything a store holds: (tensors by name, JSON-able numbers).

    Pages that several rows share are written once. They are in host memory, everything else is
    on the store's device.
    """
    used = sorted({block for row in store.table.rows for block in row.blocks})
    place = {block: i for i, block in enumerate(used)}
    index, payload = store.pool.read(used, torch.device("cpu"))
    width = store.raw.width
    tensors = {
        "index": index,
        "payload": payload,
        "keys": store.raw.keys[:, :, :width],
        "values": store.raw.values[:, :, :width],
        "query_square": store.statistics.query_square,
    }
    for b, held in enumerate(store.raw.lengths):
        if held < width:
            # Memory nobody wrote: not to be found in a file.
            for name in ("keys", "values"):
                tensors[name] = tensors[name].clone()
                tensors[name][b, :, held:] = 0
    if store.constants is not None:
        tensors["constants"] = store.constants
    numbers = {
        "format": store.format.name,
        "rows": [{"blocks": [place[x] for x in r.blocks], "counts": r.counts} for r in store.table.rows],
        "lengths": store.raw.lengths,
        "queries_seen": store.statistics.queries_seen,
        "prompt_tokens": store.statistics.prompt_tokens,
        "has_constants": store.statistics.has_constants,
    }
    return tensors, numbers


@torch.inference_mode(False)
@torch.no_grad()
def restore(config: SelfIndexConfig, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> LayerStore:
    """The store that `export` described.

    Raises:
        FormatError: tensors and numbers do not fit each other or `config`.
    """
    try:
        store = LayerStore(config, tensors["keys"][:, :, :0])
        if store.format.name != numbers["format"]:
            raise FormatError(f"pages are in format {numbers['format']}, not {store.format.name}")
        pages = tensors["index"].shape[0]
        blocks = store.pool.add(tensors["index"], tensors["payload"]) if pages else []
        for b, row in enumerate(numbers["rows"]):
            own = [blocks[i] for i in row["blocks"]]
            store.pool.retain(own)
            store.table.append(b, own, [int(n) for n in row["counts"]])
        store.pool.release(blocks)
        for b, held in enumerate(numbers["lengths"]):
            store.raw.put(slice(b, b + 1), 0, tensors["keys"][b, :, :held], tensors["values"][b, :, :held])
        store.statistics = Statistics(
            tensors["constants"].clone() if "constants" in tensors else None,
            tensors["query_square"].clone(),
            int(numbers["queries_seen"]),
            tuple(bool(x) for x in numbers["has_constants"]),
            tuple(int(n) for n in numbers["prompt_tokens"]),
        )
        widths = {len(numbers[n]) for n in ("rows", "lengths", "prompt_tokens", "has_constants")}
        if widths != {store.batch}:
            raise FormatError(f"the layer has {store.batch} rows, its lists have {sorted(widths)}")
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"a layer's tensors do not fit its description: {error}") from error
    return store
