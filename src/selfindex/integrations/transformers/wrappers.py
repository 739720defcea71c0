"""What models come wrapped in: the model itself is what holds the attention layers and the configuration."""

from __future__ import annotations

import sys
from typing import Any, cast

from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT's, torch.compile's and data-parallel wrappers, adapters included.

    What accelerate adds to a model's `forward` is part of the model and stays.

    Raises:
        UnsupportedModelError: it is no transformers model, or an adapter puts tokens of its own into the
            cache or replaces attention.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, OptimizedModule):
            inner = inner._orig_mod
        elif isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            inner = _without_adapter(inner)
        if inner is None:
            raise UnsupportedModelError(
                f"expected a transformers model, got {type(model).__name__}; pass the model itself, "
                "not a pipeline or a path"
            )
    return inner


def _without_adapter(model: Any) -> nn.Module | None:
    """The model inside one of PEFT's; None if it is none of them."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            config = model.peft_config[name]
            if config.is_prompt_learning or config.is_adaption_prompt:
                raise UnsupportedModelError(
                    f"adapter {name!r} ({config.peft_type}) puts tokens of its own before the prompt, "
                    "or replaces attention; supported are adapters that change weights, such as LoRA"
                )
        return cast(nn.Module, model.get_base_model())
    if isinstance(model, PeftMixedModel):
        return cast(nn.Module, model.base_model.model)
    return cast(nn.Module, model.model) if isinstance(model, BaseTuner) else None
