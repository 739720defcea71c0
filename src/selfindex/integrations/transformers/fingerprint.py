"""Tells models apart by what shapes their keys and values: every weight, adapters included."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ...errors import StateError
from .adapters import INNER, acting, is_adapter_layer, parts

_BLOCK = 512
"""64-bit words that are summed into one."""

_SAMPLE = 256
"""Words of a weight that are taken as they are."""

_NOT_IN_KEYS = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "dtype", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "problem_type",
    "quantization_config", "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
"""What a configuration says that does not change keys, or that the weights say themselves."""

_Maps = tuple[tuple[Any, str], ...]
"""Where accelerate keeps weights that are not in the model, and the start of their names there."""

_Known = tuple[Any, bytes, _Maps]
"""What tells that a weight is still the same, its digest, and the maps that the former names."""

_remembered: weakref.WeakKeyDictionary[nn.Module, dict[str, _Known]] = weakref.WeakKeyDictionary()
"""Digests of a model's weights by name."""


@dataclass(frozen=True)
class _Weight:
    name: str
    value: Tensor
    module: nn.Module
    maps: _Maps


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 in hex over the configuration and all weights that shape what a cache holds.

    Covers parameters and saved buffers, packed and quantised ones with their scales, and the adapters
    that act, with their scaling; not the output embeddings. Bits decide, so another dtype or
    quantisation is another model, but devices do not matter, nor does offloading: what accelerate
    keeps on disk or in host memory is read from there. Adapters that are off do not count, and merged
    ones count as the weights they became.

    Every byte goes into a sum of 4 KiB, and a sample of them as they are: enough to notice any training
    and any exchange, at the speed of memory; nothing that withstands somebody who wants to forge it.
    What was read is remembered until a weight is replaced, counts another write in place, or differs in
    its sample; writing less than that through `.data`, which PyTorch does not count, goes unnoticed.

    Raises:
        StateError: a weight is on the meta device, and nothing says where its bytes are.
    """
    digest = hashlib.sha256(
        json.dumps(_facts(model.config.to_diff_dict()), sort_keys=True, default=str).encode()
    )
    known, old = {}, _remembered.get(model, {})
    # Without the heads on top, which see what a cache already holds.
    body, head = model.base_model, model.get_output_embeddings()
    for name, value in _walk(body, "", head, ()):
        digest.update(f"\n{name} ".encode())
        if isinstance(value, _Weight):
            known[name] = _digest_once(value, old.get(name))
            digest.update(known[name][1])
        else:
            digest.update(repr(value).encode())
    _remembered[model] = known
    return digest.hexdigest()


def _facts(options: Any) -> Any:
    """A configuration without what does not matter; an option that is off is as if it did not exist."""
    if isinstance(options, dict):
        return {
            str(name): _facts(x)
            for name, x in options.items()
            if name not in _NOT_IN_KEYS
            and not str(name).endswith("_token_id")
            and x is not None
            and x is not False
        }
    return [_facts(x) for x in options] if isinstance(options, (list, tuple)) else options


def _walk(module: nn.Module, name: str, head: nn.Module | None, maps: _Maps) -> Iterator[tuple[str, Any]]:
    """(name, weight or number) of a module and what is in it, as if nobody had wrapped a layer."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        found = getattr(one, "weights_map", None)
        if found is not None:
            maps = (*maps, (found, ""))
    saved = {k: x for k, x in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for key, weight in sorted((module._parameters | saved).items()):
        if weight is not None:
            own = tuple((found, f"{start}{key}") for found, start in maps)
            yield f"{name}{key}", _Weight(f"{name}{key}", weight, module, own)
    children: dict[str, nn.Module | None] = dict(module._modules)
    if is_adapter_layer(module):
        replaced = False
        for place, adapter in enumerate(acting(module)):
            for key, part in parts(module, adapter).items():
                # By place: another process may have given the adapter another name.
                yield from _walk_part(part, f"{name}{key}.{place}", _inside(maps, f"{key}.{adapter}"), module)
                replaced |= key == "modules_to_save"
        children = {k: x for k, x in children.items() if k in INNER and not replaced}
    for key, child in children.items():
        if child is not None and child is not head:
            inner = name if key in INNER else f"{name}{key}."
            yield from _walk(child, inner, head, _inside(maps, key))


def _walk_part(part: Any, name: str, maps: _Maps, owner: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a layer keeps for one adapter."""
    if isinstance(part, nn.Module):
        yield from _walk(part, f"{name}.", None, maps)
    elif isinstance(part, Tensor):
        yield name, _Weight(name, part, owner, tuple((found, start.rstrip(".")) for found, start in maps))
    elif isinstance(part, (bool, int, float)):
        yield name, part


def _inside(maps: _Maps, key: str) -> _Maps:
    return tuple((found, f"{start}{key}.") for found, start in maps)


def _digest_once(weight: _Weight, old: _Known | None) -> _Known:
    """A weight's digest; `old` if the weight is still the same."""
    if weight.value.is_meta:
        # What accelerate offloaded is not written to; one that is elsewhere now has another map.
        stamp: Any = [id(found) for found, _ in weight.maps]
    else:
        stamp = [_stamp(x) for x in _plain(weight.value, weight.module)]
    if old is not None and old[0] == stamp:
        return old
    digest = hashlib.sha256(f"{weight.value.dtype} {tuple(weight.value.shape)}".encode())
    for x in _plain(_fetch(weight), weight.module):
        _digest(x, digest)
    return stamp, digest.digest(), weight.maps


def _fetch(weight: _Weight) -> Tensor:
    """A weight, from where accelerate keeps it if that is not in the model."""
    if not weight.value.is_meta:
        return weight.value
    for found, name in reversed(weight.maps):
        try:
            value: Tensor = found[name]
        except KeyError:
            continue
        return value
    raise StateError(
        f"the weight {weight.name} is on the meta device and nothing says where its bytes are, so this model "
        "cannot be told from another; load its weights first"
    )


def _plain(weight: Tensor, module: nn.Module) -> Iterator[Tensor]:
    """The tensors of a weight: itself, or those that a subclass is made of, and its scales."""
    if is_traceable_wrapper_subclass(weight):
        for name in weight.__tensor_flatten__()[0]:
            yield from _plain(getattr(weight, name), module)
        return
    yield weight.detach().as_subclass(Tensor)
    # bitsandbytes keeps these beside the weight; those of 8 bits move to the module in the first step.
    scales = getattr(weight, "SCB", None)
    if scales is None and weight.dtype == torch.int8:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scales, Tensor):
        yield scales
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (x for _, x in sorted(vars(state).items()) if isinstance(x, Tensor))
        state = getattr(state, "state2", None)


def _stamp(x: Tensor) -> tuple[Any, ...]:
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, x.dtype, x.shape, x.stride(), x.device, _bytes(_sample(_words(x)[0]))


def _digest(x: Tensor, digest: Any) -> None:
    words, tail = _words(x)
    whole = words.numel() // _BLOCK * _BLOCK
    digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
    # Integers, which wrap: the same in any order, on every device.
    for found in (words[:whole].view(-1, _BLOCK).sum(1), words[whole:], _sample(words), tail):
        digest.update(_bytes(found))


def _words(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bytes of a tensor as int64, and those that are left, uint8."""
    flat = x.contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    return flat[:whole].view(torch.int64), flat[whole:]


def _sample(words: Tensor) -> Tensor:
    return words[:: max(1, words.numel() // _SAMPLE)]


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().cpu().numpy().tobytes()
