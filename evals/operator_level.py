"""Metrics of one attention operator: softmax mass captured, error of keys, values and output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from selfindex.evaluation.stats import Array

from .capture import Record
from .fakequant import KeySpec, ValueSpec, balance_vector
from .sparse import SINKS, Prefix, Variant, attend, encode

# variant name -> metric -> one array [queries, layers * query heads] per record
Table = dict[str, dict[str, list[Array]]]
_EXACT = Variant(KeySpec(exact=True, balance="none"), ValueSpec(kind="exact"), 1.0, "mean")
Balances = dict[str, dict[int, Tensor]]  # kind -> layer -> s


def balances(record: Record, other: Record | None) -> Balances:
    """The balance vectors a variant may name: from the whole prompt, its start, another text; "built" is
    as nearly in the cache, of keys behind the sinks, and "within 16" the same with factors of 1/16 to 16.
    """
    out: Balances = defaultdict(dict)
    for i, layer in record.layers.items():
        out["prompt"][i] = balance_vector(layer.k, layer.q_sq[0])
        for window in (256, 512, 1024):
            out[f"first{window}"][i] = balance_vector(layer.k[:, :window], layer.q_sq[window])
        out["built"][i] = balance_vector(layer.k[:, SINKS:256], layer.q_sq[256])
        out["within 16"][i] = balance_vector(layer.k[:, SINKS:256], layer.q_sq[256], limit=16)
        if other is not None:
            far = other.layers[i]
            out["other"][i] = balance_vector(far.k, far.q_sq[0])
    return out


def balance_of(all_kinds: Balances, variant: Variant, layer: int) -> Tensor | None:
    """The balance vector that a variant asks for."""
    return None if variant.key.balance == "none" else all_kinds[variant.key.balance][layer]


@torch.no_grad()
def measure(
    records: Iterable[tuple[Record, Balances]],
    variants: dict[str, Variant],
    stride: int,
    layer_step: int,
) -> Table:
    """Every `stride`-th query of the continuation, every `layer_step`-th layer, all variants."""
    table: Table = defaultdict(lambda: defaultdict(list))
    for record, kinds in records:
        rows: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for i, layer in list(record.layers.items())[::layer_step]:
            codes: dict[object, Prefix] = {}
            positions = torch.arange(0, layer.q.shape[1], stride)
            q = layer.q[:, positions]
            args = (layer.new_k, layer.new_v, layer.scaling)
            exact = encode(layer, _EXACT, None)
            truth = attend(q, exact, *args, _EXACT, positions)
            q4 = q.view(layer.k.shape[0], -1, *q.shape[1:]) * layer.scaling
            true_logits = torch.einsum("hgtd,hnd->hgtn", q4, exact.k_true)
            both = torch.cat([true_logits, truth.exact_logits], -1).softmax(-1)
            near = both[..., true_logits.shape[-1] :].sum(-1)
            probability = both[..., : true_logits.shape[-1]]
            centred = (exact.k_true - exact.k_true.mean(1, keepdim=True)).square().sum((1, 2))
            for name, variant in variants.items():
                code = (variant.key, variant.value, variant.paper)
                if code not in codes:
                    codes[code] = encode(layer, variant, balance_of(kinds, variant, i))
                prefix = codes[code]
                got = attend(q, prefix, *args, variant, positions)
                mass = near + (probability * got.selected[:, None]).sum(-1)
                error = (got.out - truth.out).norm(dim=-1) / truth.out.norm(dim=-1)
                noise = got.estimate - true_logits
                noise = noise.std(-1)
                key = (prefix.k_hat - prefix.k_true).square().sum((1, 2)) / centred
                index = (prefix.k_index - prefix.k_true).square().sum((1, 2)) / centred
                value = (prefix.v_hat - prefix.v_true).square().sum((1, 2))
                value = value / prefix.v_true.square().sum((1, 2))
                row = rows[name]
                row["mass"].append(mass.flatten(0, 1).T)
                row["err"].append(error.flatten(0, 1).T)
                row["logit_noise"].append(noise.flatten(0, 1).T)
                for metric, x in (("key_err", key), ("index_err", index), ("value_err", value)):
                    row[metric].append(x.expand(len(positions), -1))
        for name, metrics in rows.items():
            for metric, parts in metrics.items():
                array = torch.cat(parts, 1).cpu().numpy().astype(np.float64)
                table[name][metric].append(array)
    return table
