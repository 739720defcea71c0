"""Making a PyTorch operator of a function, and serving it on a device with another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_library = torch.library.Library("selfindex", "DEF")


def define(function: Function, fake: Callable[..., Any], mutates: tuple[str, ...] = ()) -> Function:
    """Make an operator, `torch.ops.selfindex.<name>`, of a function that serves every device.

    `torch.library.custom_op` would do the same with checks in Python around every call.

    Args:
        fake: shapes and dtypes of the results, for torch.compile.
        mutates: names of the tensors that are written to.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"selfindex::{name}", fake, lib=_library)
    return cast(Function, getattr(torch.ops.selfindex, name).default)


def register_kernel(name: str, device: str, function: Callable[..., Any]) -> None:
    """Serve an operator on a device type ("cpu", "cuda") with another function of the same arguments."""
    _library.impl(name, function, device.upper())


def fake_part(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Results of attention over a part of the keys: (output, log-sum-exp), float32."""
    output = query.new_empty(query.shape, dtype=torch.float32)
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)
