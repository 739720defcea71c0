"""User options of the cache, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

Preset = Literal["balanced", "paper"]
PRESETS: tuple[Preset, ...] = ("balanced", "paper")

AUTO = -1
"""Value of `sinks` and `recent` that stands for the preset's own choice."""

EVERY_QUERY = 1 << 30
"""Value of `sparse_queries` that makes every query of a chunk select for itself."""


@dataclass(frozen=True)
class SelfIndexConfig:
    """Options of a self-indexing KV cache. Immutable; every field is checked on construction.

    Args:
        preset: "balanced" (default) or "paper" (the faithful published system).
        budget: encoded tokens that each KV head attends to per query. A float in (0, 1] is a
            fraction of the tokens cached so far; an int >= 1 is a number of tokens.
            Sinks and the recent window are attended in addition.
        min_tokens: floor under a fractional budget, in tokens.
        sinks: full-precision tokens kept from the start of a sequence ("balanced"), or chosen by
            the prompt's last queries ("paper").
        recent: full-precision tokens kept at the end. Between `recent` and
            `recent + page_size - 1` tokens are held; "paper" compresses the whole prompt at once.
        page_size: tokens per encoded page; a multiple of 8.
        value_bits: bits per value channel of the "balanced" preset, 2 or 3.
        dense_below: while a row has at most this many encoded tokens, all of them are attended.
        sparse_queries: a chunk of more new queries than this (the next chat turn, chunked
            prefill) attends to the whole decoded cache instead of selecting per query.
        profile: file with the model's balance (see `BalanceProfile`); without it, balance is
            measured on the first page that is encoded.
        offloading: keep the payload plane (four fifths of the encoded bytes at head_dim 128) in pinned
            host memory, where the GPU reads what it selected; the index stays on the GPU. On a CPU
            everything is in host memory anyway, and the option changes no result. Needs Linux.
        cuda_graphs: replay decode steps as CUDA graphs where the model allows it; on a CPU it changes nothing.
        compile: run decode steps through torch.compile, for long generations: the first step takes a
            minute or more, the others less than without. Rounding differs a little.
        allow_untested: accept a model family that is not in the tested list.

    Raises:
        ConfigError: a value is out of range.
    """

    preset: Preset = "balanced"
    budget: float | int = 0.05
    min_tokens: int = 128
    sinks: int = AUTO
    recent: int = AUTO
    page_size: int = 128
    value_bits: int = 2
    dense_below: int = 1024
    sparse_queries: int = 8
    profile: str | Path | None = None
    offloading: bool = False
    cuda_graphs: bool = True
    compile: bool = False
    allow_untested: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"preset must be one of {PRESETS}, got {self.preset!r}")
        check_budget(self.budget)
        # The paper keeps 64 tokens chosen from the prompt and no further window.
        if self.sinks == AUTO:
            object.__setattr__(self, "sinks", 64 if self.preset == "paper" else 16)
        if self.recent == AUTO:
            object.__setattr__(self, "recent", 0 if self.preset == "paper" else 64)
        for name in ("min_tokens", "sinks", "recent", "dense_below", "sparse_queries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} must be an integer >= 0, got {value!r}")
        if not isinstance(self.page_size, int) or self.page_size < 8 or self.page_size % 8:
            raise ConfigError(f"page_size must be a positive multiple of 8, got {self.page_size!r}")
        for name in ("offloading", "cuda_graphs", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.value_bits not in (2, 3):
            raise ConfigError(f"value_bits must be 2 or 3, got {self.value_bits!r}")
        if self.preset == "paper" and self.value_bits != 2:
            raise ConfigError("the paper preset stores values in 2 bits; use preset='balanced' for 3")
        if self.preset == "paper" and self.profile is not None:
            raise ConfigError("the paper preset takes its statistics from the prompt, not a profile")

    @classmethod
    def make(cls, config: SelfIndexConfig | None = None, **options: Any) -> SelfIndexConfig:
        """Build a config from options, or override some options of an existing one.

        Raises:
            ConfigError: an option does not exist or is out of range.
        """
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"unknown option {', '.join(unknown)}; options are: {known}")
        return cls(**options) if config is None else replace(config, **options)

    def budget_tokens(self, length: int, encoded: int) -> int:
        """Encoded tokens to attend for a row of `length` cached tokens, `encoded` of them encoded.

        Returns `encoded` (attend to everything) up to `dense_below` encoded tokens.
        """
        if encoded <= self.dense_below:
            return encoded
        if isinstance(self.budget, int):
            wanted = self.budget
        else:
            wanted = max(self.min_tokens, math.ceil(self.budget * length))
        return min(wanted, encoded)


def check_budget(budget: float | int) -> None:
    """Raise ConfigError unless `budget` is a fraction in (0, 1] or a token count >= 1."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ConfigError(f"budget must be a number, got {budget!r}")
    if isinstance(budget, int):
        if budget < 1:
            raise ConfigError(f"an integer budget is a number of tokens and must be >= 1, got {budget}")
    elif not 0.0 < budget <= 1.0:  # also false for NaN
        raise ConfigError(
            f"a float budget is a fraction of the cached tokens and must be in (0, 1], got {budget}; "
            "pass an integer for a number of tokens"
        )
