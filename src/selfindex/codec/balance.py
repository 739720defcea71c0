"""The balance s between loud key channels and loud query channels, and its per-model profile.

Rotation spreads quantisation error evenly over channels. Where loud key channels meet quiet query
channels that makes logits worse, so keys are multiplied and queries divided by
s = sqrt(query rms / key deviation) before rotating; q.k does not change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import FormatError
from ..files import write_tensors

LIMIT = 4.0
"""s is clamped to [1 / LIMIT, LIMIT] in what is stored."""

_NAME = re.compile(r"layers\.(\d+)\.balance")


def measure_balance(keys: Tensor, query_square: Tensor, limit: float = LIMIT) -> Tensor:
    """Balance of one layer.

    Args:
        keys: [n, H, N, d], post-RoPE keys; statistics are taken over n and N.
        query_square: float [H, d], mean square of post-RoPE queries over tokens and the GQA group.
        limit: the largest factor, and one over the smallest.
    Returns:
        float32 [H, d], equal in both channels (i, i + d / 2) of a RoPE pair.
    """
    deviation = keys.float().transpose(0, 1).flatten(1, 2).var(1, correction=0)
    pair_keys, pair_queries = _fold_pairs(deviation).sqrt(), _fold_pairs(query_square.float()).sqrt()
    usable = (pair_keys > 0) & (pair_queries > 0)
    ratio = torch.where(usable, pair_queries / pair_keys.clamp(min=1e-30), 1.0).sqrt()
    ratio = ratio / ratio.median(-1, keepdim=True).values
    return ratio.clamp(1 / limit, limit).repeat(1, 2)


def _fold_pairs(square: Tensor) -> Tensor:
    """Mean over the two channels (i, i + d / 2) that RoPE mixes: [H, d] -> [H, d / 2]."""
    return square.unflatten(-1, (2, -1)).mean(-2)


@dataclass(frozen=True)
class BalanceProfile:
    """Balance of every layer of one model, so that pages can be shared between prompts.

    Attributes:
        balance: layer index -> float32 [H, d].
    """

    balance: dict[int, Tensor]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        # Cloned: safetensors refuses tensors that share memory.
        tensors = {f"layers.{i}.balance": s.cpu().contiguous().clone() for i, s in self.balance.items()}
        write_tensors(tensors, path, {"format": "selfindex-profile", "version": "1"})

    @classmethod
    def load(cls, path: str | Path) -> BalanceProfile:
        """Read a file written by `save`.

        Raises:
            FormatError: the file is missing, damaged, or not a profile of a known version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise FormatError(f"cannot read the profile {path}: {error}") from error
        if meta.get("format") != "selfindex-profile" or meta.get("version") != "1":
            raise FormatError(f"{path} is not a selfindex profile of version 1")
        if not all(torch.isfinite(s).all() and (s > 0).all() for s in tensors.values()):
            raise FormatError(f"the profile {path} holds values that are not positive numbers")
        layers = {_NAME.fullmatch(name): s.float() for name, s in tensors.items()}
        if None in layers:
            raise FormatError(f"the profile {path} holds tensors that are not a layer's balance")
        return cls({int(match[1]): s for match, s in layers.items() if match})
