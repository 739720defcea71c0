"""A layer store as plain tensors and numbers, and back: what is written to disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import SelfIndexConfig
from ..errors import FormatError, SelfIndexError
from .layer import LayerStore
from .statistics import Statistics


def export(store: LayerStore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything a store holds: (tensors by name, JSON-able numbers).

    Pages that several rows share are written once. They are in host memory, everything else is
    on the store's device.
    """
    used = sorted({block for row in store.table.rows for block in row.blocks})
    place = {block: i for i, block in enumerate(used)}
    index, payload = store.pool.read(used, torch.device("cpu"))
    width = store.window.width
    tensors = {
        "index": index,
        "payload": payload,
        "keys": store.window.keys[:, :, :width],
        "values": store.window.values[:, :, :width],
        "query_square": store.statistics.query_square,
    }
    for b, held in enumerate(store.window.lengths):
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
        "lengths": store.window.lengths,
        "queries_seen": store.statistics.queries_seen,
        "prompt_tokens": store.statistics.prompt_tokens,
        "has_constants": store.statistics.has_constants,
        "shared": store.statistics.shared,
    }
    return tensors, numbers


@torch.inference_mode(False)
@torch.no_grad()
def restore(config: SelfIndexConfig, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> LayerStore:
    """The store that `export` described, this one's or that of files of version 2.

    Raises:
        FormatError: tensors and numbers do not fit each other or `config`.
    """
    try:
        keys = tensors["keys"]
        if keys.ndim != 4 or not keys.is_floating_point():
            raise FormatError(f"tokens are {keys.dtype} {tuple(keys.shape)}")
        store = LayerStore(config, keys[:, :, :0])
        tensors, numbers = _of_rows(store, tensors, numbers)
        _check_tensors(store, tensors, numbers)
        _check_numbers(store, tensors, numbers)
        pages = tensors["index"].shape[0]
        blocks = store.pool.add(tensors["index"], tensors["payload"]) if pages else []
        for b, row in enumerate(numbers["rows"]):
            own = [blocks[i] for i in row["blocks"]]
            store.pool.retain(own)
            store.table.append(b, own, list(row["counts"]))
        store.pool.release(blocks)
        for b, held in enumerate(numbers["lengths"]):
            store.window.put(slice(b, b + 1), 0, keys[b, :, :held], tensors["values"][b, :, :held])
        store.statistics = Statistics(
            tensors["constants"].clone() if "constants" in tensors else None,
            tensors["query_square"].clone(),
            tuple(numbers["queries_seen"]),
            tuple(numbers["has_constants"]),
            tuple(numbers["prompt_tokens"]),
            numbers["shared"],
        )
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, SelfIndexError):
            raise
        raise FormatError(f"a layer's tensors do not fit its description: {error!r}") from error
    return store


def _of_rows(
    store: LayerStore, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers as `export` gives them; in files of version 2 rows had one balance together."""
    if "shared" in numbers:
        return tensors, numbers
    square, seen = tensors["query_square"], [numbers["queries_seen"]] * store.batch
    shared = store.format.preset == "balanced" and "constants" in tensors
    together = {"query_square": square.expand(store.batch, *square.shape)} if square.ndim == 2 else {}
    return tensors | together, numbers | {"queries_seen": seen, "shared": shared}


def _check_tensors(store: LayerStore, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Raise FormatError unless there are just the tensors of a store, of the right types and shapes."""
    fmt, keys = store.format, tensors["keys"]
    if fmt.name != numbers["format"]:
        raise FormatError(f"pages are in format {numbers['format']}, not {fmt.name}")
    pages = tensors["index"].shape[0]
    own = 1 if numbers["shared"] is True else store.batch
    wanted = {
        "index": (torch.uint8, (pages, fmt.index_bytes)),
        "payload": (torch.uint8, (pages, fmt.payload_bytes)),
        "keys": (keys.dtype, tuple(keys.shape)),
        "values": (keys.dtype, tuple(keys.shape)),
        "query_square": (torch.float32, (store.batch, fmt.kv_heads, fmt.head_dim)),
        "constants": (torch.float32, (own, fmt.kv_heads, fmt.constants)),
    }
    if "constants" not in tensors and not pages:
        del wanted["constants"]
    found = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    for name in wanted.keys() | found.keys():
        if found.get(name) != wanted.get(name):
            raise FormatError(f"{name} is {found.get(name)}, a layer needs {wanted.get(name)}")


def _check_numbers(store: LayerStore, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Raise FormatError unless the numbers are those of a store with these tensors."""
    batch, width, paper = store.batch, tensors["keys"].shape[2], store.format.preset == "paper"
    names = "rows", "lengths", "prompt_tokens", "has_constants", "queries_seen"
    lists, shared = {name: numbers[name] for name in names}, numbers["shared"]
    if batch == 0 or any(len(x) != batch for x in lists.values()):
        raise FormatError(f"the layer has {batch} rows, its lists { {n: len(x) for n, x in lists.items()} }")
    if type(shared) is not bool or (shared and (paper or "constants" not in tensors)):
        raise FormatError(f"the layer's rows have constants in common: {shared}")
    most = store.format.count(tensors["index"].cpu()).tolist()
    if any(not 1 <= n <= store.format.page_size for n in most):
        raise FormatError(f"pages say that they hold {most} tokens")
    everywhere: set[int] = set()
    for b, row in enumerate(numbers["rows"]):
        blocks, counts, held = row["blocks"], row["counts"], numbers["lengths"][b]
        prompt, fixed = numbers["prompt_tokens"][b], numbers["has_constants"][b]
        _check_integers([*blocks, *counts, held, prompt])
        everywhere |= set(blocks)
        # Any page may be short: `crop` cuts one, and more may follow.
        right = len(set(blocks)) == len(blocks) == len(counts) and all(i < len(most) for i in blocks)
        if not right or not all(1 <= n <= most[i] for i, n in zip(blocks, counts, strict=True)):
            raise FormatError(f"row {b} has blocks {blocks} with {counts} tokens, the pages hold {most}")
        if held > width or (blocks and held < store.config.front):
            raise FormatError(f"row {b} has {held} tokens in full precision, of {width}")
        # A row's own constants come with its first page, the paper preset's mostly from its prompt.
        needed = bool(blocks or prompt) and not shared
        possible = "constants" in tensors and not shared
        if type(fixed) is not bool or (fixed and not possible) or (needed and not fixed):
            raise FormatError(f"row {b} has constants: {fixed}, blocks {blocks} and a prompt of {prompt}")
        if prompt > held + sum(counts) or (prompt and not (paper or store.config.pinned_tokens)):
            raise FormatError(f"row {b} has a prompt of {prompt} tokens, and {held + sum(counts)} in all")
    if everywhere != set(range(len(most))) or max(numbers["lengths"]) != width:
        raise FormatError("the layer has pages or tokens that no row holds")
    _check_integers(numbers["queries_seen"])


def _check_integers(numbers: list[Any]) -> None:
    wrong = [n for n in numbers if type(n) is not int or n < 0]
    if wrong:
        raise FormatError(f"{wrong[0]!r} is not a number of tokens or a page")
