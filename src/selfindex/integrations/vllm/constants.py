"""What encoded keys refer to: constants of the model, fixed before the first page that requests may share.

They are the balance of keys, or the statistics of the paper preset. They come from a profile (balance only),
or from the user's cache folder, or are measured when the engine starts: the model reads a text that is always
there, with exact attention. Nothing depends on any request.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...backends import ops
from ...codec import BalanceProfile, measure_balance
from ...config import Preset
from ...errors import ConfigError, FormatError
from ...manual import manual
from . import kept
from .kept import layer_index

TOKENS = 2048
"""Tokens of the text to read, if the engine takes as many at once."""


def fix_at_start() -> None:
    """Have the constants fixed by the next question for the cache's specs, the first call after loading.

    A runner has the model, and an attention layer meets its runner nowhere: its class is wrapped, once.
    """
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
        runner = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if runner is None or hasattr(runner.get_kv_cache_spec, "_selfindex"):
            continue
        ask = runner.get_kv_cache_spec

        runner.get_kv_cache_spec = _fixing(ask)


def _fixing(ask: Any) -> Any:
    @wraps(ask)
    def get_kv_cache_spec(self: Any) -> Any:
        fix(self)
        return ask(self)

    get_kv_cache_spec._selfindex = True  # type: ignore[attr-defined]
    return get_kv_cache_spec


def fix(runner: Any) -> None:
    """Give every encoded layer of a runner's model its constants, unless it has them."""
    engine = runner.vllm_config
    layers = {
        name: layer
        for name, layer in engine.compilation_config.static_forward_context.items()
        if hasattr(getattr(layer, "impl", None), "fixed")
    }
    todo = [layer for layer in layers.values() if not layer.impl.fixed]
    if not todo:
        return
    config = todo[0].impl.config
    if config.profile is None:
        found = _found(runner, layers, config.preset)
    else:
        found = _from_profile(config.profile, layers)
    for name, layer in layers.items():
        layer.impl.constants = found[name].to(layer.impl.constants.device, torch.float32)[None]
        layer.impl.fixed = True


def _found(runner: Any, layers: dict[str, Any], preset: Preset) -> dict[str, Tensor]:
    """What was measured at an earlier start, or is now."""
    path = kept.place(runner, preset, _tokens(runner))
    shapes = {name: tuple(layer.impl.constants.shape[1:]) for name, layer in layers.items()}
    found = kept.load(path, preset, shapes)
    everywhere = _all_ranks(found is not None)
    if found is not None and everywhere:
        return found
    measured = _measure(runner, layers, preset)
    kept.save(path, preset, measured)
    return measured


def _from_profile(path: str | Path, layers: dict[str, Any]) -> dict[str, Tensor]:
    """This rank's KV heads of a profile, which holds all of the model's."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    profile, found = BalanceProfile.load(path), {}
    for name, layer in layers.items():
        index, heads, dim = layer_index(name), layer.impl.num_kv_heads, layer.impl.head_size
        balance = profile.balance.get(index)
        if balance is None or balance.shape[1] != dim or balance.shape[0] % heads:
            shape = None if balance is None else tuple(balance.shape)
            raise FormatError(
                f"the profile {path} has {shape} for layer {index}, this model needs heads of {dim} "
                f"channels, {heads} on each rank; it was made for another model"
            )
        # With fewer KV heads than ranks, some ranks hold the same ones.
        first = rank * balance.shape[0] // ranks
        found[name] = balance[first : first + heads]
    return found


def _all_ranks(flag: bool) -> bool:
    """Whether it holds on every rank: measuring runs the model, which all of them have to do or none."""
    from vllm.distributed.parallel_state import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return flag
    votes = torch.tensor([int(flag)])
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(votes.item())


def _tokens(runner: Any) -> int:
    scheduler = runner.vllm_config.scheduler_config
    return int(min(TOKENS, runner.model_config.max_model_len, scheduler.max_num_batched_tokens))


def _text_ids(runner: Any) -> list[int]:
    """The start of CPython's reference manual in the model's tokens; without a tokenizer, arbitrary ones."""
    count, model = _tokens(runner), runner.model_config
    if not model.skip_tokenizer_init:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
        ids: list[int] = tokenizer(manual()[: 16 * count])["input_ids"][:count]
        return ids
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(model.get_vocab_size(), (count,), generator=generator).tolist()
    return drawn


class _Measuring:
    """Stands in for an attention layer's implementation: exact attention, and notes of its tensors."""

    def __init__(self, replaced: Any, preset: Preset) -> None:
        self._replaced, self._preset = replaced, preset
        self.constants_found: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replaced, name)

    def do_kv_cache_update(self, *args: Any, **kwargs: Any) -> None:
        """There is no cache yet."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        output: Tensor,
        **further: Any,
    ) -> Tensor:
        keys = key.transpose(0, 1)
        if self._preset == "paper":
            self.constants_found = ops.prompt_statistics(keys)
        else:
            square = query.float().square().unflatten(1, (key.shape[1], -1)).mean((0, 2))
            self.constants_found = measure_balance(keys[None], square)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        window = getattr(layer, "sliding_window", None)
        mask = None
        if window is not None:
            place = torch.arange(query.shape[0], device=query.device)
            behind = place[:, None] - place
            mask = (behind >= 0) & (behind < window)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self._replaced.scale, enable_gqa=True
        )
        output.copy_(attended[0].transpose(0, 1).reshape(output.shape))
        return output


@contextmanager
def _measuring(runner: Any, preset: Preset) -> Iterator[dict[str, _Measuring]]:
    layers = runner.vllm_config.compilation_config.static_forward_context
    old = {name: layer.impl for name, layer in layers.items() if hasattr(layer, "impl")}
    new = {name: _Measuring(impl, preset) for name, impl in old.items()}
    try:
        for name, impl in new.items():
            layers[name].impl = impl
        yield new
    finally:
        for name, impl in old.items():
            layers[name].impl = impl


@torch.inference_mode()
def _measure(runner: Any, layers: dict[str, Any], preset: Preset) -> dict[str, Tensor]:
    from vllm.forward_context import set_forward_context
    from vllm.logger import init_logger

    ids = torch.tensor(_text_ids(runner), device=runner.device)
    positions = torch.arange(len(ids), device=runner.device)
    if getattr(runner.model_config, "uses_mrope", False):
        positions = positions.expand(3, -1)
    init_logger("vllm.selfindex").info("measuring the constants of keys on %d tokens", len(ids))
    engine = runner.vllm_config
    if engine.lora_config is not None:  # which adapters act is said anew for each batch: none do here
        runner._set_active_loras((0,), (0,) * len(ids), set())
    with (
        _measuring(runner, preset) as notes,
        set_forward_context(None, engine, num_tokens=len(ids), skip_compiled=True),
    ):
        runner.get_model()(input_ids=ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
    found = {name: notes[name].constants_found for name in layers}
    missing = [name for name, constants in found.items() if constants is None]
    if missing:
        raise ConfigError(
            f"the constants of keys could not be measured in {missing[0]}, which the model does not run: "
            "make a file with `selfindex profile` and give it as profile"
        )
    return {name: constants.cpu() for name, constants in found.items() if constants is not None}
