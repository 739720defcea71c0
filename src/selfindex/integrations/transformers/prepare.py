"""`prepare`: make a model able to run with this cache, and take that back."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .attention import register
from .methods import place_methods, remove_methods
from .passes import begin, check_name, end, text_config, text_models


class _Users:
    """How many preparations a module serves, and its hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        self.hooks = []
        # A copy of a prepared model has the hooks already.
        if begin not in module._forward_pre_hooks.values():
            self.hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(end, with_kwargs=True, always_call=True))


_users: WeakKeyDictionary[nn.Module, _Users] = WeakKeyDictionary()


def prepare(model: PreTrainedModel) -> Callable[[], None]:
    """Make a model able to run with this cache; with any other, and without one, it runs as before.

    Returns:
        a function that takes this back; the model is as it was when all preparations are taken back,
        in whatever order.

    Raises:
        UnsupportedModelError: the model's attention cannot be replaced.
    """
    check_name(text_config(model)._attn_implementation)
    modules = list(text_models(model))
    for module in modules:
        if not module._can_set_attn_implementation():
            raise UnsupportedModelError(
                f"{type(module).__name__} does not let its attention implementation be replaced"
            )
    register()
    for module in modules:
        if module not in _users:
            _users[module] = _Users(module)
        _users[module].count += 1
    place_methods(model)

    def undo() -> None:
        while modules:
            module = modules.pop()
            users = _users[module]
            users.count -= 1
            if users.count == 0:
                for hook in users.hooks:
                    hook.remove()
                remove_methods(cast(PreTrainedModel, module))
                del _users[module]

    return undo
