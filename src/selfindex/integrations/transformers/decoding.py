"""`generate`: the project's own decode loop, which replays a CUDA graph on a GPU."""

from __future__ import annotations

import warnings
from functools import cache as once
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...errors import InputError
from .cache import SelfIndexCache
from .loop import DecodeLoop, ready, why_not
from .models import cache_argument

CHECK_EVERY = 8
"""Steps between two looks at whether all rows have ended: each look waits for the GPU."""


@once
def _announce(reason: str) -> None:
    warnings.warn(
        f"selfindex.generate runs step by step, not as a graph: {reason}", RuntimeWarning, stacklevel=3
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cache: SelfIndexCache | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    compile: bool = False,
    **options: Any,
) -> Tensor:
    """Continue a prompt, greedily or by sampling; the fast way to decode on a GPU.

    Gives the tokens that `model.generate` gives with the same cache and options. On a GPU the
    steps replay one CUDA graph (the first step captures it, which takes seconds); on a CPU, and
    for models with sliding-window layers or the paper preset, they run one by one.
    `model.generate` offers more: beams, stopping criteria, assisted generation, streaming.

    Args:
        input_ids: int64 [B, T], including what `cache` holds already, as for `model.generate`.
        attention_mask: [B, T], 0 for padding, which must be on the left.
        cache: filled or empty; None makes one from `options`, fields of `SelfIndexConfig`.
        temperature, top_k, top_p: sampling; 0 and 1.0 mean all tokens.
        eos_token_id: tokens that end a row; None takes the model's.
        pad_token_id: what fills rows that have ended; None takes the model's, or the first eos.
        compile: run the steps through torch.compile, for long generations: the first step takes a
            minute or more, the others less than without. Rounding differs a little.
    Returns:
        int64 [B, T + n], n <= max_new_tokens.

    Raises:
        InputError: an argument does not fit the others.
        ConfigError, UnsupportedModelError: as `SelfIndexCache`.
    """
    if cache is None:
        cache = SelfIndexCache(model, **options)
    elif options:
        raise InputError(f"options of a new cache ({', '.join(options)}) do not fit a given one")
    _check(input_ids, attention_mask, cache, max_new_tokens)
    ends = _ends(model, eos_token_id)
    if pad_token_id is None:
        own = getattr(model.generation_config, "pad_token_id", None)
        pad_token_id = own if own is not None else (ends[0] if ends else 0)
    stop = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
    warpers = _warpers(temperature, top_k, top_p) if do_sample else None
    argument = cache_argument(model)

    def forward(ids: Tensor, mask: Tensor | None) -> Tensor:
        given: dict[str, Any] = {argument: cache, "attention_mask": mask, "logits_to_keep": 1}
        if mask is not None:
            given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return model(input_ids=ids, **given).logits[:, -1].float()

    past, mask, loop = cache.get_seq_length(), attention_mask, None
    logits = forward(input_ids[:, past:], mask)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    produced: list[Tensor] = []
    reason = why_not(cache)
    if reason is not None and input_ids.is_cuda:
        _announce(reason)
    try:
        while True:
            token = torch.where(ended, pad_token_id, _choose(logits, warpers))
            produced.append(token)
            ended = ended | torch.isin(token, stop)
            left = max_new_tokens - len(produced)
            if left == 0 or (ends and len(produced) % CHECK_EVERY == 0 and bool(ended.all())):
                break
            if loop is None and reason is None and ready(cache):
                loop = DecodeLoop(model, cache, left, compile)
            if loop is not None:
                logits = loop.step(token)
            else:
                if mask is not None:
                    mask = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), 1)
                logits = forward(token[:, None], mask)
    finally:
        if loop is not None:
            loop.close()
    new = torch.stack(produced, 1)
    if ends:
        # Nothing after the column where the last row ended.
        going = torch.isin(new, stop).cumsum(1).eq(0).any(0)
        kept = min(int(going.sum()) + 1, new.shape[1])
        if kept < new.shape[1]:
            cache.crop(kept - new.shape[1])
            new = new[:, :kept]
    return torch.cat((input_ids, new), 1)


def _check(ids: Tensor, mask: Tensor | None, cache: SelfIndexCache, steps: int) -> None:
    if ids.ndim != 2 or ids.is_floating_point():
        raise InputError(f"input_ids must be integers [batch, tokens], got {tuple(ids.shape)}, {ids.dtype}")
    if cache.get_seq_length() >= ids.shape[1]:
        raise InputError(
            f"the cache holds {cache.get_seq_length()} tokens, input_ids only {ids.shape[1]}: pass the whole "
            "sequence, with at least one token that is not in the cache yet"
        )
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    if mask is not None and not bool(mask[:, -1].all()):
        raise InputError("generation needs padding on the left: the last column of attention_mask has zeros")
    if steps < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {steps}")


def _ends(model: PreTrainedModel, given: int | list[int] | None) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None) if given is None else given
    return [] if ends is None else ([ends] if isinstance(ends, int) else list(ends))


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    chosen = LogitsProcessorList()
    if temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen


def _choose(logits: Tensor, warpers: LogitsProcessorList | None) -> Tensor:
    """Next tokens int64 [B]; `warpers` None is greedy."""
    if warpers is None:
        return logits.argmax(-1)
    # What was generated so far, which these warpers do not look at.
    before = cast(torch.LongTensor, logits.new_empty(logits.shape[0], 0, dtype=torch.long))
    scores = warpers(before, cast(torch.FloatTensor, logits))
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]
