"""The designs that the ablation compares, grouped by question."""

from __future__ import annotations

from dataclasses import replace

from .compensation import RULES
from .fakequant import KeySpec, ValueSpec
from .sparse import Variant

EXACT_KEY = KeySpec(exact=True)
EXACT_VALUE = ValueSpec(kind="exact")
# selection only: what is selected is attended with exact keys and values
BASE = Variant(EXACT_KEY, EXACT_VALUE)
STORED = Variant()


def _key(base: Variant = BASE, **changes: object) -> Variant:
    return replace(base, key=replace(base.key, **changes))  # type: ignore[arg-type]


def _value(base: Variant = STORED, **changes: object) -> Variant:
    return replace(base, value=replace(base.value, **changes))  # type: ignore[arg-type]


def page_designs() -> dict[str, Variant]:
    """Question 1: the mean that keys are stored against. Keys stored, values exact."""
    base = replace(STORED, value=EXACT_VALUE)
    return {
        "page 256": base,
        "page 128": _key(base, page=128),
        "page 64": _key(base, page=64),
        "page 32": _key(base, page=32),
        "page 512": _key(base, page=512),
        "page 256, float mean": _key(base, int8_mean=False),
        "whole prompt": _key(base, page=None),
        "no mean": _key(base, centre=False),
    }


def balance_designs() -> dict[str, Variant]:
    """Question 2: where the balance vector comes from. Keys stored, values exact."""
    base = replace(STORED, value=EXACT_VALUE)
    return {
        "whole prompt": base,
        "first 256": _key(base, balance="first256"),
        "first 512": _key(base, balance="first512"),
        "first 1024": _key(base, balance="first1024"),
        "another text": _key(base, balance="other"),
        "none": _key(base, balance="none"),
        "none, unrotated": _key(base, balance="none", rotate=False),
    }


def value_designs() -> dict[str, Variant]:
    """Question 3: values, under dense attention with exact keys."""
    base = replace(STORED, key=EXACT_KEY, budget=1.0, aggregate="mean")
    out = {}
    for group in (32, 64, 0):
        for fit in ("unbiased", "mse"):
            label = "token" if group == 0 else str(group)
            out[f"V2 lloyd g{label} {fit}"] = _value(base, group=group, fit=fit)
    for group in (32, 64):
        out[f"V2 uniform .85 g{group}"] = _value(base, group=group, kind="uniform")
    out["V2 uniform 1.0 g32"] = _value(base, kind="uniform", clip=1.0)
    out["V2 lloyd g32 unbiased, unrotated"] = _value(base, rotate=False)
    for group in (32, 0):
        for fit in ("unbiased", "mse"):
            label = "token" if group == 0 else str(group)
            out[f"V3 lloyd g{label} {fit}"] = _value(base, bits=3, group=group, fit=fit)
    out["V2 lloyd g32 unbiased centred"] = _value(base, centre=True)
    out["V2 lloyd gtoken unbiased centred"] = _value(base, group=0, centre=True)
    out["V2 lloyd gtoken mse centred"] = _value(base, group=0, fit="mse", centre=True)
    out["V2 uniform .75 g32"] = _value(base, kind="uniform", clip=0.75)
    out["V3 uniform .85 g32"] = _value(base, bits=3, kind="uniform")
    out["V3 lloyd gtoken unbiased centred"] = _value(base, bits=3, group=0, centre=True)
    out["V4 lloyd gtoken unbiased"] = _value(base, bits=4, group=0)
    return out


def aggregate_designs() -> dict[str, Variant]:
    """Question 4: from query heads to a KV head. Selection only."""
    names = {
        "sum, full normaliser": "sum_full",
        "sum, encoded normaliser": "sum",
        "max, full normaliser": "max_full",
        "max, encoded normaliser": "max",
        "mean query": "mean",
        "oracle": "oracle",
    }
    out = {label: replace(BASE, aggregate=how) for label, how in names.items()}
    for factor in (0.7, 0.5, 0.35, 0.2):
        out[f"sum, encoded normaliser, logits x {factor}"] = replace(BASE, aggregate="sum", sharpness=factor)
    return out


def score_designs() -> dict[str, Variant]:
    """Question 5: the token scale, the score constant, rerank. Selection only."""
    return {
        "scale, a = .798": BASE,
        "no token scale": _key(token_scale=False),
        "no token scale, mean query": replace(_key(token_scale=False), aggregate="mean"),
        "a = .70": _key(constant=0.70),
        "a = .90": _key(constant=0.90),
        "a = 1.0": _key(constant=1.0),
        "a = 1.25": _key(constant=1.25),
        "rerank 2x": replace(_key(exact=False), value=EXACT_VALUE, rerank=2),
        "rerank 4x": replace(_key(exact=False), value=EXACT_VALUE, rerank=4),
        "no rerank, stored keys": replace(STORED, value=EXACT_VALUE),
        "paper, mean query": replace(BASE, paper=True, aggregate="mean"),
    }


GROUPS = {
    "pages": page_designs,
    "balance": balance_designs,
    "values": value_designs,
    "aggregate": aggregate_designs,
    "score": score_designs,
}


DEFAULT = Variant(
    KeySpec(page=128, balance="built", constant=0.9),
    ValueSpec(group=0, page=128),
    aggregate="sum",
    sharpness=0.5,
    comp_page=128,
)
"""The default preset as it is built, but for evenly spaced value levels."""


def open_choices() -> dict[str, dict[str, object]]:
    """Changes to the default that would cost code and bytes: do they pay?"""
    return {
        "default": {},
        "default, rerank 2x": {"rerank": 2},
        "default, rerank 4x": {"rerank": 4},
        "default, threshold": {"spread": "threshold"},
        "default, budget per head": {"spread": "heads"},
        "default, budget per layer": {"spread": "layers"},
        "default, budget per head, other text": {"spread": "other heads"},
        "default, first layer dense": {"dense_layers": 1},
        "default, first 2 layers dense": {"dense_layers": 2},
        "default, compensation": {"comp": "on"},
        "default, gated compensation": {"comp": "gate"},
        "default, careful compensation": {"comp": "careful"},
        "default, gated compensation, threshold": {"comp": "gate", "spread": "threshold"},
    }


def _trellis(states: int) -> Variant:
    return _value(_key(DEFAULT, states=states), states=states)


def variants() -> dict[str, Variant]:
    """The default, and it with one thing else, most of them at its bytes."""
    return {
        "default": DEFAULT,
        "keys of equal norm": _key(DEFAULT, fit="norm"),
        "unbiased key scale": _key(DEFAULT, fit="unbiased"),
        "balance within 16": _key(DEFAULT, balance="within 16"),
        "key levels of least angle": _key(DEFAULT, search=True),
        "shaped key errors": _key(DEFAULT, shaped=True),
        "a scale for the index": _key(DEFAULT, own_scale=True),
        "mean before RoPE": _key(DEFAULT, rotary=True),
        "mean per 64 tokens": _key(DEFAULT, page=64),
        "values of equal norm": _value(DEFAULT, fit="norm"),
        "value levels of least angle": _value(DEFAULT, search=True),
        "64 sinks": replace(DEFAULT, sinks=64),
        "256 recent tokens": replace(DEFAULT, recent=256),
        "votes of plain softmax": replace(DEFAULT, sharpness=1.0),
        "drawn": replace(DEFAULT, sharpness=1.0, sampled=True),
        "7.5 %": replace(DEFAULT, budget=0.075),
        "rerank 2x": replace(DEFAULT, rerank=2),
        "10 %": replace(DEFAULT, budget=0.1),
        "25 %": replace(DEFAULT, budget=0.25),
        "10 %, drawn": replace(DEFAULT, budget=0.1, sharpness=1.0, sampled=True),
        "rerank 3x": replace(DEFAULT, rerank=3),
        "3-bit values": _value(DEFAULT, bits=3),
        "trellis, 8 states": _trellis(8),
        "trellis, 64 states": _trellis(64),
        "oracle's tokens": replace(DEFAULT, aggregate="oracle"),
        "all tokens": replace(DEFAULT, budget=1.0),
        "all tokens, 3-bit values": replace(_value(DEFAULT, bits=3), budget=1.0),
        "all tokens, exact keys": replace(_key(DEFAULT, exact=True), budget=1.0),
        "all tokens, exact values": replace(DEFAULT, value=EXACT_VALUE, budget=1.0),
        "all tokens, trellis, 8 states": replace(_trellis(8), budget=1.0),
        "all tokens, trellis, 64 states": replace(_trellis(64), budget=1.0),
        "exact keys and values, drawn": replace(
            _key(DEFAULT, exact=True), value=EXACT_VALUE, sharpness=1.0, sampled=True
        ),
        "exact keys and values": replace(_key(DEFAULT, exact=True), value=EXACT_VALUE),
    }


def end_to_end_designs() -> dict[str, Variant]:
    """Questions 6 and 7: complete designs. "same tokens" is the paper with our exact tokens."""
    v2 = _value(group=32)
    v3 = _value(bits=3, group=0)
    paper = Variant(paper=True, aggregate="mean", snapkv_sinks=True)
    out = {
        "balanced V2": v2,
        "balanced V3": v3,
        "paper": paper,
        "paper, same tokens": replace(paper, snapkv_sinks=False),
        "V2 uniform g32": _value(kind="uniform"),
        "V2 centred gtoken": _value(group=0, centre=True),
        "V3 page 64": replace(v3, key=replace(v3.key, page=64)),
        "V3 page 128": replace(v3, key=replace(v3.key, page=128)),
        "V3 balance 512": replace(v3, key=replace(v3.key, balance="first512")),
        "V3 mean query": replace(v3, aggregate="mean"),
        "exact payload": BASE,
        "V2 sharpness 0.5": replace(v2, aggregate="sum", sharpness=0.5),
    }
    for name, changes in open_choices().items():
        out[name] = replace(DEFAULT, **changes)  # type: ignore[arg-type]
    for rule in RULES[1:]:
        out[f"V3 comp {rule}"] = replace(v3, comp=rule)
    return out
