"""Compressed prefixes on disk: a safetensors file, never code.

The file holds the pages as they are in memory (docs/format.md), the full-precision tokens, what other
layers hold, and as metadata a version, the options, a fingerprint of the model and checksums of every
tensor and of the metadata. Reading it costs what reading and copying the bytes costs; nothing is encoded
again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ...config import SelfIndexConfig
from ...errors import ConfigError, FormatError, StateError
from ...files import write_tensors
from ...store.state import export, restore
from . import bounded
from .fingerprint import fingerprint
from .layered import LayeredCache

KIND, VERSION, READ = "selfindex-cache", "4", ("2", "3", "4")
"""Kind and version of the files that are written, and versions that can be read."""


def save(cache: LayeredCache, model: PreTrainedModel, path: str | Path) -> None:
    """Write a cache; see `SelfIndexCache.save`."""
    attention = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    if len({layer.get_seq_length() for layer in attention}) != 1:
        raise StateError(
            "a forward pass was interrupted; cache.crop(...) to the last complete step, then save"
        )
    cache.state.check()
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer in cache.compressed_layers:
        if layer.store is None or not layer.positions:
            raise StateError("the cache is empty; fill it with a forward pass before saving it")
        found, numbers = export(layer.store)
        # Cloned: safetensors refuses tensors that share memory.
        tensors |= {
            f"layers.{layer.layer_idx}.{name}": x.cpu().contiguous().clone() for name, x in found.items()
        }
        layers.append({"layer": layer.layer_idx, "columns": layer.positions} | numbers)
    others = []
    for i, other in enumerate(cache.layers):
        if bounded.holds(other):
            found, numbers = bounded.export(other)
            tensors |= {f"others.{i}.{name}": x.cpu().contiguous().clone() for name, x in found.items()}
            others.append({"layer": i} | numbers)
    if cache.positions is not None:
        tensors["columns"] = cache.positions.cpu().contiguous().clone()
    # A profile's balance is in the constants; its file need not exist where this one is read.
    options = dataclasses.asdict(cache.config) | {"profile": None}
    header = json.dumps(
        {
            "model": fingerprint(model),
            "dtype": str(model.dtype),
            "options": options,
            "layers": layers,
            "others": others,
            "tensors": _describe(tensors),
        }
    )
    metadata = {
        "format": KIND,
        "version": VERSION,
        "header": header,
        "checksum": _header_checksum(VERSION, header),
    }
    write_tensors(tensors, path, metadata)


def load(cache: LayeredCache, model: PreTrainedModel, path: str | Path, header: dict[str, Any]) -> None:
    """Fill an empty cache from a file with that header; see `SelfIndexCache.load`."""
    try:
        _fill(cache, model, header, _read(path, header))
    except FormatError as error:
        raise FormatError(f"cannot load {path}: {error}") from error


def _fill(
    cache: LayeredCache, model: PreTrainedModel, header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    wanted = [layer.layer_idx for layer in cache.compressed_layers]
    found = [numbers.get("layer") for numbers in header["layers"]]
    if found != wanted or any(type(i) is not int for i in found):
        raise FormatError(f"it holds layers {found}, the model has {wanted}")
    positions = tensors.pop("columns", None)
    width = _width(positions, header["layers"])
    stores = []
    for numbers in header["layers"]:
        start, device = f"layers.{numbers['layer']}.", _device(model, numbers["layer"])
        own = {n.removeprefix(start): tensors.pop(n) for n in list(tensors) if n.startswith(start)}
        # Pages go straight to where the pool keeps them.
        own = {n: x if n in ("index", "payload") else x.to(device) for n, x in own.items()}
        store = restore(cache.config, own, numbers)
        tokens = [width] * store.batch if positions is None else positions.sum(1).tolist()
        if [store.length(b) for b in range(store.batch)] != tokens:
            raise FormatError(f"the tokens of layer {numbers['layer']} do not fit its positions")
        stores.append(store)
    if len({store.batch for store in stores}) != 1:
        raise FormatError(f"its layers differ in rows: {[store.batch for store in stores]}")
    _fill_others(cache, model, header["others"], tensors, stores[0].batch, width)
    if tensors:
        raise FormatError(f"it holds more than layers: {sorted(tensors)}")
    for layer, store in zip(cache.compressed_layers, stores, strict=True):
        layer.store, layer.positions = store, width
    if positions is not None:
        cache.positions = positions.to(_device(model, wanted[0]))
    cache.state.remember()


def _fill_others(
    cache: LayeredCache,
    model: PreTrainedModel,
    others: list[Any],
    tensors: dict[str, Tensor],
    batch: int,
    width: int,
) -> None:
    wanted = [i for i, layer in enumerate(cache.layers) if bounded.holds(layer)]
    found = [numbers.get("layer") for numbers in others]
    if found != wanted or any(type(i) is not int for i in found):
        raise FormatError(f"it holds windows or states of layers {found}, the model has {wanted}")
    for numbers in others:
        start, device = f"others.{numbers['layer']}.", _device(model, numbers["layer"])
        own = {n: tensors.pop(n).to(device) for n in list(tensors) if n.startswith(start)}
        own = {n.removeprefix(start): x for n, x in own.items()}
        bounded.restore(cache.layers[numbers["layer"]], own, numbers, batch, width)


def _device(model: PreTrainedModel, layer: int) -> torch.device:
    """Where a layer is: with device_map, not all are on one device."""
    for name, weight in model.named_parameters():
        if f"layers.{layer}." in name and not weight.is_meta:
            return weight.device
    return model.device


def _width(positions: Tensor | None, layers: list[Any]) -> int:
    """Columns that every layer holds.

    Raises:
        FormatError: layers or the padding contradict each other.
    """
    counts = [numbers.get("columns") for numbers in layers]
    first = counts[0]
    if any(type(n) is not int or n < 1 or n != first for n in counts):
        raise FormatError(f"its layers hold {counts} positions")
    if positions is not None and (positions.dtype, positions.shape[1:]) != (torch.bool, (first,)):
        raise FormatError(f"its padding is {positions.dtype} {tuple(positions.shape)}, for {first} positions")
    return int(first)


def read_options(header: dict[str, Any], path: str | Path) -> SelfIndexConfig:
    """The options a file was written with."""
    try:
        return SelfIndexConfig.make(**header["options"])
    except (ConfigError, TypeError) as error:
        raise FormatError(f"the options in {path} cannot be read: {error}") from error


def read_header(path: str | Path, model: PreTrainedModel) -> dict[str, Any]:
    """What a file says about itself.

    Raises:
        FormatError: the file is missing, damaged, newer, or of another model or dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
    except Exception as error:
        raise FormatError(f"cannot read the cache {path}: {error}") from error
    if meta.get("format") != KIND:
        raise FormatError(f"{path} is not a file of SelfIndexCache.save")
    if meta.get("version") not in READ:
        raise FormatError(
            f"{path} has version {meta.get('version')}, this release reads versions {', '.join(READ)}; "
            "fill a cache again and save it"
        )
    if meta.get("checksum") != _header_checksum(meta["version"], meta.get("header", "")):
        raise FormatError(f"the header of {path} is damaged: it is not what was written")
    try:
        header: dict[str, Any] = json.loads(meta["header"])
        if meta["version"] < "4":
            header["others"] = []  # such models could not be saved
        kinds = {"model": str, "dtype": str, "options": dict, "layers": list, "others": list, "tensors": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(header[name], kind)]
        if wrong or not all(isinstance(x, dict) for x in header["layers"] + header["others"]):
            raise ValueError(f"{', '.join(wrong) or 'layers'} cannot be what it is")
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the header of {path} is damaged: {error}") from error
    if header["dtype"] != str(model.dtype):
        raise FormatError(
            f"{path} was written with a model in {header['dtype']}, this one is in {model.dtype}; load the "
            "model in that dtype"
        )
    if header["model"] != fingerprint(model):
        raise FormatError(
            f"{path} was written with another model, or with other weights, adapters or options of it; a "
            "cache fits only the model that filled it"
        )
    return header


def _read(path: str | Path, header: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise FormatError(str(error)) from error
    written, found = header["tensors"], _describe(tensors)
    for name in written.keys() | found.keys():
        if name not in found or written.get(name) != found[name]:
            raise FormatError(f"it is damaged, {name} is missing or not what was written")
    return tensors


def _header_checksum(version: str, header: str) -> str:
    return hashlib.sha256(f"{KIND} {version} {header}".encode()).hexdigest()


def _describe(tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Type, shape and checksum of every tensor, as JSON gives them back."""
    # Hashing a large buffer leaves the interpreter to other threads; one thread is slower than a disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_checksum, tensors.values()))
    return {n: [str(x.dtype), list(x.shape), s] for (n, x), s in zip(tensors.items(), sums, strict=True)}


def _checksum(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().data).hexdigest() if x.numel() else ""
