"""The baselines do what their publications define."""

import pytest
import torch
from tiny_models import forward, pair, prompt
from torch.nn.functional import scaled_dot_product_attention

from selfindex.evaluation.baselines import baseline_cache, baselines
from selfindex.evaluation.baselines.base import Baseline, full_precision
from selfindex.evaluation.baselines.quantised import FP8, KIVI, Dense, RotatedLloydMax, minmax
from selfindex.evaluation.baselines.sparse import DoubleSparse, Oracle, Quest, SnapKV, StreamingLLM
from selfindex.evaluation.recording import record

N, D = 400, 64


@pytest.fixture
def layer():
    """(query [4, N, D], keys, values [2, N, D])."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(h, N, D, generator=generator) for h in (4, 2, 2))


def grouped(query, at):
    return query[:, at].unflatten(0, (2, -1))


def test_minmax_has_few_values_and_an_error_of_half_a_step():
    x = torch.randn(3, 70)
    got = minmax(x, 2, 32)
    for part, stored in zip(x.split(32, -1), got.split(32, -1), strict=True):
        step = (part.amax(-1) - part.amin(-1)) / 3
        assert ((part - stored).abs().amax(-1) <= 0.51 * step + 2e-3).all()
        assert all(len(row.unique()) <= 4 for row in stored)


def test_kivi_quantises_keys_by_channel_and_values_by_token(layer):
    query, keys, values = layer
    loud = torch.linspace(1, 1000, D)  # channels of very different size
    stored = KIVI(2).store(query, keys * loud, values, 0.1)
    error = ((stored.keys - keys * loud) / loud).abs()
    assert error[:, :256].amax() < 1.2  # a third of a channel's range of about 5
    assert len(stored.keys[0, :32, 7].unique()) <= 4
    assert len(stored.values[0, 5, :32].unique()) <= 4
    assert not error[:, -128:].any()
    assert stored.exact.sum() == 128 + (N - 128) % 32


def test_fp8_has_three_mantissa_bits(layer):
    stored = FP8().store(*layer, 0.1)
    keys = layer[1]
    near = keys.abs() > 0.05
    assert ((stored.keys - keys).abs() / keys.abs())[near].max() <= 2**-4 + 1e-6


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_rotated_lloyd_max_has_the_known_distortion_of_a_gaussian(layer, bits, distortion):
    # Max, "Quantizing for minimum distortion" (1960), table I.
    keys = layer[1] * torch.linspace(0.2, 5, D)  # rotation evens the channels out
    stored = RotatedLloydMax(bits).store(layer[0], keys, layer[2], 0.1)
    far = ~stored.exact
    error = (stored.keys - keys)[:, far].square().sum() / keys[:, far].square().sum()
    assert float(error) == pytest.approx(distortion, rel=0.08)


def test_quest_bounds_every_key_of_a_page(layer):
    query, keys, _ = layer
    method = Quest(0.1)
    stored = method.store(*layer, 0.1)
    low, high = stored.index
    assert low.shape == (2, 25, D)
    q = grouped(query, slice(0, 3))
    bound = q.clamp(min=0) @ high[:, None].mT + q.clamp(max=0) @ low[:, None].mT
    best = (q @ keys[:, None].mT).unflatten(-1, (25, 16)).amax(-1)
    assert (bound >= best - 1e-4).all()
    chosen = method.select(stored, q, 0.1)
    assert (chosen.sum(-1) <= 48).all()
    assert torch.equal(chosen.unflatten(-1, (25, 16)).any(-1), chosen.unflatten(-1, (25, 16)).all(-1))


def test_oracle_holds_the_most_mass(layer):
    query, keys, _ = layer
    q = grouped(query, slice(100, 104))
    mass = (q @ keys[:, None].mT).masked_fill(full_precision(N), -torch.inf).softmax(-1).sum(1)
    methods = Oracle(0.1), Quest(0.1), DoubleSparse(0.1)
    chosen = [m.select(m.store(*layer, 1.0), q, 1.0) for m in methods]
    held = [float((mass * c).sum()) for c in chosen]
    assert held[0] == max(held)
    assert (chosen[0].sum(-1) == 40).all()


def test_double_sparse_with_all_channels_is_the_oracle(layer):
    q = grouped(layer[0], slice(0, 4))
    whole, oracle = DoubleSparse(0.1, channels=1.0), Oracle(0.1)
    assert torch.equal(
        whole.select(whole.store(*layer, 0.1), q, 0.1), oracle.select(oracle.store(*layer, 0.1), q, 0.1)
    )


def test_snapkv_keeps_what_the_last_queries_look_at(layer):
    query, keys, values = (x.clone() for x in layer)
    keys[0, 150] = 10 * query[:2, -1].mean(0)
    kept = SnapKV(0.05).store(query, keys, values, 0.1).kept
    assert kept[0, 147:154].all(), "pooling keeps the neighbours"
    assert (kept.sum(-1) == 80 + 20).all()
    assert kept[:, -64:].all()


def test_streaming_keeps_the_ends(layer):
    kept = StreamingLLM(0.1).store(*layer, 0.1).kept
    assert kept[:, :16].all()
    assert kept[:, -104:].all()
    assert not kept[:, 16:-104].any()


def test_attention_of_new_tokens_is_causal_and_goes_on(layer):
    query, keys, values = layer
    baseline = Baseline(Dense(), Dense().store(query[:, :390], keys[:, :390], values[:, :390], 0.1))
    parts = [
        baseline.attend(query[None, :, part], keys[None, :, part], values[None, :, part], 0.1)
        for part in (slice(390, 393), slice(393, 400))
    ]
    wanted = scaled_dot_product_attention(query, keys, values, scale=0.1, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(torch.cat(parts, 1)[0].transpose(0, 1), wanted[:, 390:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dense_as_a_baseline_is_the_dense_model(family):
    dense, ours = pair(family)
    ids = prompt(130)
    cache = baseline_cache(ours, record(ours, ids[:, :120]), Dense())
    wanted = forward(dense, ids)[:, 120:]
    torch.testing.assert_close(forward(ours, ids[:, 120:], cache), wanted, atol=1e-4, rtol=1e-4)


def test_bytes_per_token():
    methods = baselines(0.05)
    sizes = {name: method.bytes_per_token(64) for name, method in methods.items()}
    assert sizes["dense"] == 256
    assert sizes["KIVI-2"] == 48
    assert sizes["Quest 5 %"] == 272
    assert sizes["SnapKV 5 %"] == pytest.approx(12.8)
    assert methods["Quest 5 %"].bytes_read(64) == pytest.approx(12.8 + 16)
    assert all(method.bytes_read(64) <= method.bytes_per_token(64) + 1e-9 for method in methods.values())
