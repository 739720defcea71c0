"""Compressed prefixes on disk: a safetensors file, never code.

The file holds the pages as they are in memory (docs/format.md), the full-precision tokens, and as
metadata a version, the options, a fingerprint of the model and a checksum of every tensor. Reading
it costs what reading and copying the bytes costs; nothing is encoded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...config import SelfIndexConfig
from ...errors import FormatError, StateError
from ...store.state import export, restore

if TYPE_CHECKING:
    from .cache import SelfIndexCache

KIND, VERSION = "selfindex-cache", "1"
_SAMPLE = 4096
"""Elements of a weight that go into the fingerprint."""


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies a model by its shapes, its positions and a sample of its weights.

    The same for every dtype and device: a sample is rounded to 3 digits of its largest value.
    """
    text = model.config.get_text_config(decoder=True)
    known = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    facts: dict[str, Any] = {name: getattr(text, name, None) for name in known}
    facts["rope"] = getattr(text, "rope_parameters", None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        if name.endswith(("k_proj.weight", "qkv_proj.weight", "embed_tokens.weight")):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu()
            scale = sample.abs().max().clamp(min=1e-30)
            digest.update(f"{name} {(sample / scale).square().mean().sqrt():.2f}".encode())
    return digest.hexdigest()


def save(cache: SelfIndexCache, model: PreTrainedModel, path: str | Path) -> None:
    """Write a cache; see `SelfIndexCache.save`."""
    if not cache.only_compressed:
        raise StateError(
            "a cache with sliding-window or linear-attention layers cannot be saved: their content is not "
            "part of the format"
        )
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer in cache.compressed_layers:
        if layer.store is None:
            raise StateError("the cache is empty; fill it with a forward pass before saving it")
        found, numbers = export(layer.store)
        # Cloned: safetensors refuses tensors that share memory.
        tensors |= {
            f"layers.{layer.layer_idx}.{name}": x.cpu().contiguous().clone() for name, x in found.items()
        }
        layers.append({"layer": layer.layer_idx, "columns": layer.columns} | numbers)
    if cache.columns is not None:
        tensors["columns"] = cache.columns.cpu().contiguous().clone()
    # A profile's balance is in the constants; its file need not exist where this one is read.
    options = dataclasses.asdict(cache.config) | {"profile": None}
    header = {
        "options": options,
        "layers": layers,
        "checksums": _checksums(tensors),
    }
    metadata = {
        "format": KIND,
        "version": VERSION,
        "model": fingerprint(model),
        "header": json.dumps(header),
    }
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        # Beside its place, then renamed into it: a crash or a full disk leaves no half of a file.
        save_file(tensors, name, metadata=metadata)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def load(cache: SelfIndexCache, model: PreTrainedModel, path: str | Path) -> None:
    """Fill an empty cache from a file; see `SelfIndexCache.load`."""
    header, tensors = _read(path, model)
    dtype = model.dtype
    stores = {}
    for numbers in header["layers"]:
        start, device = f"layers.{numbers['layer']}.", _device(model, int(numbers["layer"]))
        own = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
        # Pages go straight to where the pool keeps them.
        own = {n: x if n in ("index", "payload") else x.to(device) for n, x in own.items()}
        if own["keys"].dtype != dtype:
            raise FormatError(
                f"{path} holds {own['keys'].dtype} tokens, the model computes in {dtype}; load the model in "
                "that dtype"
            )
        stores[numbers["layer"]] = restore(cache.config, own, numbers), int(numbers["columns"])
    if sorted(stores) != sorted(x.layer_idx for x in cache.compressed_layers):
        raise FormatError(f"{path} holds layers {sorted(stores)}, the model has others")
    for layer in cache.compressed_layers:
        layer.store, layer.columns = stores[layer.layer_idx]
        layer.is_initialized = True
    if "columns" in tensors:
        cache.columns = tensors["columns"].to(_device(model, cache.compressed_layers[0].layer_idx))


def _device(model: PreTrainedModel, layer: int) -> torch.device:
    """Where a layer is: with device_map, not all are on one device."""
    for name, weight in model.named_parameters():
        if f"layers.{layer}." in name and not weight.is_meta:
            return weight.device
    return model.device


def read_options(path: str | Path, model: PreTrainedModel) -> SelfIndexConfig:
    """The options a file was written with."""
    return SelfIndexConfig.make(**_header(path, model)["options"])


def _header(path: str | Path, model: PreTrainedModel) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
    except Exception as error:
        raise FormatError(f"cannot read the cache {path}: {error}") from error
    if meta.get("format") != KIND:
        raise FormatError(f"{path} is not a file of SelfIndexCache.save")
    if meta.get("version") != VERSION:
        raise FormatError(f"{path} has version {meta.get('version')}, this release reads version {VERSION}")
    if meta.get("model") != fingerprint(model):
        raise FormatError(
            f"{path} was written with another model; a cache fits only the model that filled it"
        )
    try:
        header: dict[str, Any] = json.loads(meta["header"])
        header["options"], header["layers"], header["checksums"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"the header of {path} is damaged: {error}") from error
    return header


def _read(path: str | Path, model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = _header(path, model)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise FormatError(f"cannot read the cache {path}: {error}") from error
    found = _checksums(tensors)
    for name in header["checksums"].keys() | tensors.keys():
        if name not in tensors or header["checksums"].get(name) != found[name]:
            raise FormatError(f"{path} is damaged: {name} is missing or not what was written")
    return header, tensors


def _checksums(tensors: dict[str, Tensor]) -> dict[str, str]:
    # Hashing a large buffer leaves the interpreter to other threads; one thread is slower than a disk.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_checksum, tensors.values()), strict=True))


def _checksum(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().data).hexdigest() if x.numel() else ""
