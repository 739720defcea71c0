"""The cache as a model type of EleutherAI's lm-evaluation-harness.

    python -m selfindex.integrations.lm_eval --model selfindex \
        --model_args pretrained=NAME,budget=0.05 --tasks TASK

Everything else is as for its model type `hf`, whose arguments are understood as well. The harness
scores a continuation in one dense pass over context and continuation, where a cache would have no
effect. Here the context but its last token is read and compressed first; that token and the
continuation then attend through the cache, every one of them selecting its own tokens.
"""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ..config import BARE_SHARE, EVERY_QUERY, SelfIndexConfig
from ..errors import ConfigError
from .transformers import SelfIndexCache
from .transformers.models import cache_argument

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("selfindex")
class SelfIndexLM(HFLM):
    """A Hugging Face model that decodes through a `SelfIndexCache`.

    Args:
        pretrained: as for `hf`.
        kwargs: fields of `SelfIndexConfig` (`budget=0.05`, `preset=paper`, ...), arguments of `hf`.

    Raises:
        ConfigError: an option is out of range, or the model is not a decoder.
    """

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in SelfIndexConfig.__annotations__}
        # A score is about what the cache keeps: every query selects, however short the context.
        always = BARE_SHARE | {"sparse_queries": EVERY_QUERY}
        self.cache_config = SelfIndexConfig.make(**(always | options))
        super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ConfigError("the cache needs a decoder-only model")

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Per request (texts, context ids, continuation ids): (log-likelihood, is it greedy)."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: requests[i][1])
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="loglikelihood requests")
        for context, group in groupby(order, key=lambda i: requests[i][1]):
            shared: SelfIndexCache | None = None
            for i in group:
                continuation = requests[i][2]
                # As the harness does it: what does not fit is cut from the left.
                whole = (context + continuation)[-(self.max_length + 1) :]
                start = len(whole) - len(continuation) - 1
                cut = len(whole) < len(context) + len(continuation)
                if shared is None or cut:
                    cache = self._read(whole[:start])
                    shared = None if cut else cache
                else:
                    cache = shared
                # Continuations of one context start from copies of one compressed cache.
                found[i] = self._score(copy.deepcopy(cache), whole[start:])
                bar.update()
        bar.close()
        return found

    @torch.inference_mode()
    def _read(self, ids: list[int]) -> SelfIndexCache:
        cache = SelfIndexCache(self.model, self.cache_config)
        if ids:
            self._forward(torch.tensor([ids], device=self.device), cache, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def _score(self, cache: SelfIndexCache, ids: list[int]) -> tuple[float, bool]:
        fed = torch.tensor([ids], device=self.device)
        scores = self._forward(fed[:, :-1], cache)[0].float().log_softmax(-1)
        target = fed[0, 1:, None]
        greedy = bool((scores.argmax(-1, keepdim=True) == target).all())
        return float(scores.gather(1, target).sum()), greedy

    def _forward(self, ids: Tensor, cache: SelfIndexCache, **options: Any) -> Tensor:
        return self.model(input_ids=ids, **{cache_argument(self.model): cache}, **options).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        cache = SelfIndexCache(self.model, self.cache_config)
        return super()._model_generate(
            context, max_length, stop, **{cache_argument(self.model): cache}, **kwargs
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
