"""User options of the cache, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

Preset = Literal["balanced", "paper"]
PRESETS: tuple[Preset, ...] = ("balanced", "paper")

Prefill = Literal["exact", "sparse"]
PREFILLS: tuple[Prefill, ...] = ("exact", "sparse")

AUTO = -1
"""Value of `sinks` and `recent` that stands for the preset's own choice."""

EVERY_QUERY = 1 << 30
"""Value of `sparse_queries` that makes every query of a chunk select for itself."""

BARE_SHARE: dict[str, Any] = {"dense_below": 0, "min_tokens": 1}
"""Options under which a share is read as it is, however short a row: for measurements."""

MOST = 1 << 30
"""Largest number of tokens an option may name: sums of two still fit the operators' 32-bit integers."""

MOST_PAGE = 1 << 15
"""Largest page in tokens, hundreds of times what is useful."""


class _Chosen(int):
    """A number that the preset chose for `AUTO`: a config made from this one chooses anew."""


@dataclass(frozen=True, repr=False)
class SelfIndexConfig:
    """Options of a self-indexing KV cache. Immutable; every field is checked on construction.

    Numbers of any integer or real type (NumPy's too) are kept as Python's. `dataclasses.replace` and
    `make` give what a new config with the changed options would be: what a preset chose is chosen anew.

    Args:
        preset: "balanced" (default) or "paper" (the faithful published system).
        budget: encoded tokens that each KV head attends to per query. A float in (0, 1] is a
            fraction of the tokens cached so far, at least `min_tokens`; an int >= 1 is a number of
            tokens. Sinks and the recent window are attended in addition.
        min_tokens: floor under a fractional budget, in tokens. Below it more reading costs little and
            finds more; as many as `dense_below`, so that a longer row never reads less.
        sinks: full-precision tokens kept from the start of a sequence ("balanced"), or chosen by
            the prompt's last queries ("paper").
        recent: full-precision tokens kept at the end. Between `recent` and
            `recent + page_size - 1` tokens are held; "paper" compresses the whole prompt at once.
        pinned_tokens: further full-precision tokens of a prompt, which each KV head chooses: those that the
            prompt's last 32 queries attend to most. For prompts that end with their question. They are
            chosen when a row begins with a chunk that fills a page, inside which it cannot be cropped then;
            other rows keep as many more from their start. "balanced" only: those of "paper" are its `sinks`.
        page_size: tokens per encoded page; a multiple of 8.
        value_bits: bits per value channel of the "balanced" preset, 2 or 3.
        dense_below: while a row has at most this many encoded tokens, all of them are attended.
        sparse_queries: a chunk of more new queries than this (the next chat turn, chunked
            prefill) attends to the whole decoded cache instead of selecting per query.
        prefill: how a prompt attends to itself: "exact" (default), or "sparse", where every block of 128
            queries reads the blocks of 128 keys that it selects, and some always (the first, the own and
            the one before it). Later chunks of more than 512 tokens do so with everything before them as
            well, decoded. Exact in any case are rows of up to `dense_below` tokens, the last 256 tokens of
            a prompt or chunk, and layers that are not compressed. Steps are as always.
        prefill_mass: share of the softmax, as it is estimated, that the selected blocks are to hold, in
            (0, 1]; 1 selects as many as `prefill_density` allows.
        prefill_density: most blocks that are selected, as a share of those before the queries, in (0, 1].
        profile: file with the model's balance (see `BalanceProfile`); without it, balance is
            measured on the first page that is encoded.
        offloading: keep the payload plane (four fifths of the encoded bytes at head_dim 128) in pinned
            host memory, where the GPU reads what it selected; the index stays on the GPU. On a CPU
            everything is in host memory anyway, and the option changes no result. Needs Linux.
        cuda_graphs: replay decode steps as CUDA graphs where the model allows it; changes nothing on a CPU.
        compile: run decode steps through torch.compile, for long generations: the first step takes a
            minute or more, the others less than without. Rounding differs a little.
        allow_untested: accept a model family that is not in the tested list.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    preset: Preset = "balanced"
    budget: float | int = 0.05
    min_tokens: int = 1024
    sinks: int = AUTO
    recent: int = AUTO
    pinned_tokens: int = 0
    page_size: int = 128
    value_bits: int = 2
    dense_below: int = 1024
    sparse_queries: int = 8
    prefill: Prefill = "exact"
    prefill_mass: float = 0.95
    prefill_density: float = 1.0
    profile: str | Path | None = None
    offloading: bool = False
    cuda_graphs: bool = True
    compile: bool = False
    allow_untested: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            raise ConfigError(f"preset must be one of {PRESETS}, got {self.preset!r}")
        self._set("budget", check_budget(self.budget))
        # The paper keeps 64 tokens chosen from the prompt and no further window.
        paper = self.preset == "paper"
        for name, chosen in (("sinks", 64 if paper else 16), ("recent", 0 if paper else 64)):
            value = getattr(self, name)
            automatic = isinstance(value, _Chosen) or (_is_integer(value) and value == AUTO)
            self._set(name, _Chosen(chosen) if automatic else _integer(name, value, 0))
        for name in ("pinned_tokens", "min_tokens", "dense_below", "sparse_queries"):
            self._set(name, _integer(name, getattr(self, name), 0))
        self._set("page_size", _integer("page_size", self.page_size, 8, MOST_PAGE))
        if self.page_size % 8:
            raise ConfigError(f"page_size must be a multiple of 8, got {self.page_size}")
        self._set("value_bits", _integer("value_bits", self.value_bits, 2, 3))
        if not isinstance(self.prefill, str) or self.prefill not in PREFILLS:
            raise ConfigError(f"prefill must be one of {PREFILLS}, got {self.prefill!r}")
        for name in ("prefill_mass", "prefill_density"):
            self._set(name, _share(name, getattr(self, name)))
        for name in ("offloading", "cuda_graphs", "compile", "allow_untested"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.profile is not None and not isinstance(self.profile, (str, Path)):
            raise ConfigError(f"profile must be the path of a file, got {self.profile!r}")
        if paper and self.value_bits != 2:
            raise ConfigError("the paper preset stores values in 2 bits; use preset='balanced' for 3")
        if paper and self.pinned_tokens:
            raise ConfigError("the paper preset's pinned tokens are its sinks: set those")
        if paper and self.profile is not None:
            raise ConfigError("the paper preset takes its statistics from the prompt, not a profile")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """Only what differs from the defaults."""
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        shown = [f"{n}={v!r}" for n, v, default in given if v != default and not isinstance(v, _Chosen)]
        return f"SelfIndexConfig({', '.join(shown)})"

    @classmethod
    def make(cls, config: SelfIndexConfig | None = None, **options: Any) -> SelfIndexConfig:
        """Build a config from options, or override some options of an existing one.

        Raises:
            ConfigError: an option does not exist or is out of range, or `config` is something else.
        """
        if config is not None and not isinstance(config, SelfIndexConfig):
            raise ConfigError(
                f"config must be a SelfIndexConfig, got {config!r}; give options by name, such as budget=0.05"
            )
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ConfigError(f"unknown option {', '.join(unknown)}; options are: {known}")
        return cls(**options) if config is None else replace(config, **options)

    @property
    def front(self) -> int:
        """Full-precision tokens before a row's encoded ones."""
        return self.sinks + self.pinned_tokens

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


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integer(name: str, value: Any, least: int, most: int = MOST) -> int:
    """`value` as a Python integer; ConfigError unless it is one between `least` and `most`."""
    if not _is_integer(value) or not least <= value <= most:
        raise ConfigError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    return int(value)


def _share(name: str, value: Any) -> float:
    """`value` as a Python float; ConfigError unless it is a real number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) <= 1.0:
        raise ConfigError(f"{name} must be a number in (0, 1], got {value!r}")
    return float(value)


def check_budget(budget: float | int) -> float | int:
    """The budget as Python's number; ConfigError unless a fraction in (0, 1] or a token count >= 1."""
    if _is_integer(budget):
        if not 1 <= budget <= MOST:
            raise ConfigError(
                f"an integer budget is a number of tokens and must be >= 1 and <= {MOST}, got {budget}"
            )
        return int(budget)
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise ConfigError(f"budget must be a number, got {budget!r}")
    if not 0.0 < budget <= 1.0:  # also false for NaN
        raise ConfigError(
            f"a float budget is a fraction of the cached tokens and must be in (0, 1], got {budget}; "
            "pass an integer for a number of tokens"
        )
    return float(budget)


def parse_prefill(text: str) -> dict[str, Any]:
    """Options of a prefill as typed: "exact", "sparse", "sparse=0.9" (mass) or "sparse=10%" (density).

    Raises:
        ConfigError: it is none of these, or out of range.
    """
    kind, given, value = text.partition("=")
    options: dict[str, Any] = {"prefill": kind}
    if given:
        try:
            share = float(value.removesuffix("%"))
        except ValueError:
            share = math.nan
        if kind != "sparse" or math.isnan(share):
            raise ConfigError(
                f"prefill must be exact, sparse, sparse=0.9 (mass) or sparse=10% (density), got {text!r}"
            )
        dense = {"prefill_mass": 1.0, "prefill_density": share / 100}
        options |= dense if value.endswith("%") else {"prefill_mass": share}
    SelfIndexConfig(**options)  # refuse early
    return options
