"""Rules that decide, per query head, how much of the estimated unselected mass to add back.

`gate` and `shift` are calibrated at the end of the prefill from the last prompt queries, whose
exact attention is known; no other data is needed.

========= =========================================================================
on        add all of it
skip0     all of it, but nothing in the first layer
gate      the weight in GATES with the least error on the calibration queries
half      `gate`, but only weights up to one half
careful   `gate`, and 0 unless the error falls by a tenth at least
shift     scale the estimated mass by a calibrated factor per head, then `gate`
========= =========================================================================
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .capture import TAIL, LayerRecord
from .sparse import RECENT, SINKS, Prefix, Variant, attend

GATES = (0.0, 0.25, 0.5, 0.75, 1.0)
QUERIES = 32  # calibration queries
RULES = ("off", "on", "skip0", "gate", "half", "careful", "shift")


def _error(out: Tensor, truth: Tensor) -> Tensor:
    """Mean squared relative error per query head, [H, G, 1, 1]."""
    error = (out - truth).square().sum(-1) / truth.square().sum(-1)
    return error.mean(-1)[..., None, None]


@torch.no_grad()
def calibrate(layer: LayerRecord, prefix: Prefix, variant: Variant, first: bool) -> Prefix:
    """The prefix with the gate (and shift) that the rule `variant.comp` asks for."""
    rule = variant.comp
    heads = layer.k.shape[0]
    shape = (heads, layer.q.shape[0] // heads, 1, 1)
    if rule in ("off", "on") or (rule == "skip0" and not first):
        return prefix
    if rule == "skip0":
        return replace(prefix, gate=torch.zeros(shape))
    # The calibration queries are among the recent tokens, which they see causally.
    sinks = replace(prefix, exact_k=prefix.exact_k[:, :SINKS], exact_v=prefix.exact_v[:, :SINKS])
    q = layer.q_tail[:, -QUERIES:]
    positions = torch.arange(TAIL - QUERIES, TAIL) + RECENT - TAIL
    args = (prefix.exact_k[:, -RECENT:], prefix.exact_v[:, -RECENT:], layer.scaling)
    exact = replace(sinks, k_index=prefix.k_true, k_hat=prefix.k_true, v_hat=prefix.v_true)
    everything = replace(variant, budget=1.0, comp="off", aggregate="mean")
    truth = attend(q, exact, *args, everything, positions)
    shift: Tensor | None = None
    if rule == "shift":
        got = attend(q, sinks, *args, variant, positions)
        hidden = got.selected[:, None].expand_as(truth.estimate)
        true_mass = truth.estimate.masked_fill(hidden, -torch.inf).logsumexp(-1)
        estimated = (got.parts[3].log() + got.peak)[..., 0]
        shift = (true_mass - estimated).mean(-1)[..., None, None].clamp(-2, 2)
        sinks = replace(sinks, shift=shift)
    top, bottom, rest_top, rest_bottom = attend(q, sinks, *args, variant, positions).parts
    gates = GATES if rule != "half" else GATES[:3]
    errors = torch.stack(
        [_error((top + g * rest_top) / (bottom + g * rest_bottom), truth.out) for g in gates]
    )
    best = errors.min(0)
    gate = torch.tensor(gates)[best.indices]
    if rule == "careful":
        gate = torch.where(best.values < 0.9 * errors[0], gate, 0.0)
    return replace(prefix, gate=gate, shift=shift)
