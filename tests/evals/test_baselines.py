"""The baselines do what their publications define."""

import pytest
import torch
from tiny_models import forward, pair, prompt
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from selfindex.evaluation.baselines import LIBRARY, Unavailable, base, baseline_cache, baselines
from selfindex.evaluation.baselines.base import Baseline, full_precision
from selfindex.evaluation.baselines.quantised import FP8, KIVI, Dense, RotatedLloydMax, minmax
from selfindex.evaluation.baselines.sparse import DoubleSparse, Oracle, Quest, SnapKV, StreamingLLM
from selfindex.evaluation.methods import methods, own_bytes
from selfindex.evaluation.recording import SAMPLED_QUERIES, joined, record, sampled

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


def test_turboquant_keeps_the_length_of_vectors(layer):
    keys = layer[1] * torch.linspace(0.2, 5, D)
    plain, corrected = (
        RotatedLloydMax(2, c).store(layer[0], keys, layer[2], 0.1).keys for c in (False, True)
    )
    far = ~full_precision(N)
    ratio = corrected.norm(dim=-1) / keys.norm(dim=-1)
    assert (ratio[:, far] - 1).abs().max() < 2e-3
    assert ((plain.norm(dim=-1) / keys.norm(dim=-1))[:, far].mean() - 1).abs() > 0.03
    direction = torch.nn.functional.cosine_similarity(plain, corrected, dim=-1)
    assert (direction - 1).abs().max() < 1e-4
    zero = RotatedLloydMax(2, True).store(layer[0], 0 * keys, layer[2], 0.1).keys
    assert not zero.any()


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


@pytest.mark.parametrize("name", baselines(0.1, D))
def test_a_method_attends_in_the_dtype_of_its_tokens(layer, name):
    method = baselines(0.1, D)[name]
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        new, old = ((x.to(dtype)[:, cut] for x in layer) for cut in (slice(N - 3, N), slice(0, N - 3)))
        attended = Baseline(method, method.store(*old, 0.1)).attend(*(x[None] for x in new), 0.1)
        assert attended.dtype == dtype
        out[dtype] = attended.float()
    # A few tokens at the edge of what is read may differ.
    assert (out[torch.float32] - out[torch.bfloat16]).norm() < 0.2 * out[torch.float32].norm()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_dense_as_a_baseline_is_the_dense_model(family):
    dense, ours = pair(family)
    ids = prompt(130)
    cache = baseline_cache(ours, record(ours, ids[:, :120]), Dense())
    wanted = forward(dense, ids)[:, 120:]
    torch.testing.assert_close(forward(ours, ids[:, 120:], cache), wanted, atol=1e-4, rtol=1e-4)


def test_bytes_per_token():
    methods = baselines(0.05, 64)
    sizes = {name: method.bytes_per_token(64) for name, method in methods.items()}
    assert sizes["dense"] == 256
    assert sizes["KIVI-2"] == 48
    assert sizes["Quest 5 %"] == 272
    assert sizes["SnapKV 5 %"] == pytest.approx(12.8)
    assert methods["Quest 5 %"].bytes_read(64) == pytest.approx(12.8 + 16)
    assert sizes["KIVI-2, equal bytes"] == 40
    assert all(method.bytes_read(64) <= method.bytes_per_token(64) + 1e-9 for method in methods.values())


@pytest.mark.parametrize("dim", [64, 128])
def test_quest_at_equal_bytes_reads_what_the_default_reads(dim):
    _, ours = pair("llama" if dim == 64 else "qwen3")
    recording = record(ours, prompt(80 + 3 * 128))
    stored, read = own_bytes(methods(0.05, dim)["selfindex balanced 5 %"].make(ours, recording))
    found = baselines(0.05, dim)
    # Those of two heads in one layer are aligned less tightly than those of eight.
    assert found["Quest, bytes of 5 %"].bytes_read(dim) == pytest.approx(read, rel=0.1)
    assert 0.85 * stored < found["KIVI-2, equal bytes"].bytes_per_token(dim) <= stored


def test_a_question_that_reads_everything_and_steps_that_select():
    _, ours = pair("llama")
    ids = prompt(120)
    recording = record(ours, ids[:, :100])
    every, default, dense = (
        baseline_cache(ours, recording, method, queries)
        for method, queries in ((Quest(0.05), 1 << 30), (Quest(0.05), 8), (Dense(), 8))
    )
    chunk = [forward(ours, ids[:, 100:119], cache) for cache in (every, default, dense)]
    assert torch.equal(chunk[1], chunk[2])
    assert not torch.allclose(chunk[0], chunk[2], atol=1e-3)
    step = [forward(ours, ids[:, 119:], cache) for cache in (default, dense)]
    assert not torch.allclose(*step, atol=1e-3)


def test_logits_are_computed_some_queries_at_a_time(monkeypatch):
    _, ours = pair("llama")
    ids = prompt(90, batch=2)
    recording = record(ours, ids[:, :60])
    whole = forward(ours, ids[:, 60:], baseline_cache(ours, recording, Quest(0.3)))
    monkeypatch.setattr(base, "LOGITS", 2 * 4 * 90 * 7)  # seven queries
    parts = forward(ours, ids[:, 60:], baseline_cache(ours, recording, Quest(0.3)))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_recordings_of_rows_and_joined_ones():
    _, ours = pair("gemma3")
    ids = prompt(60, batch=3)
    whole = record(ours, ids)
    other = joined([record(ours, ids[:2]), record(ours, ids[2:])])
    assert len(other.dense.layers) == len(whole.dense.layers)
    for a, b in zip(whole.dense.layers, other.dense.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)
    for a, b, c in zip(whole.tensors, other.tensors, whole.rows(1, 3).tensors, strict=True):
        for x, y, z in zip(a[:3], b[:3], c[:3], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
            assert z.data_ptr() == x[1:].data_ptr()


def test_sampled_queries_keep_the_ends():
    query = torch.arange(9000.0)[None, None, :, None]
    found = sampled(query)[0, 0, :, 0]
    assert len(found) == SAMPLED_QUERIES
    assert torch.equal(found[:512], torch.arange(512.0))
    assert torch.equal(found[-512:], torch.arange(8488.0, 9000))
    assert (found.diff() > 0).all()
    assert sampled(query[:, :, :2048]).shape[2] == 2048


@pytest.mark.parametrize(
    ("name", "why"), [("transformers HQQ 2", "HQQ"), ("transformers quanto 4", "quanto")]
)
def test_a_backend_that_is_missing_says_so(name, why):
    if is_hqq_available() or is_optimum_quanto_available():
        pytest.skip("a backend is installed")
    _, ours = pair("llama")
    with pytest.raises(Unavailable, match=why):
        LIBRARY[name].make(ours, record(ours, prompt(100)))


def test_a_cache_of_transformers_in_fp8_is_near_the_dense_one():
    dense, ours = pair("llama")
    ids = prompt(130)
    try:
        cache = LIBRARY["transformers fp8"].make(ours, record(ours, ids[:, :120]))
    except Unavailable as error:
        pytest.skip(str(error))  # older transformers
    found, wanted = forward(ours, ids[:, 120:], cache), forward(dense, ids)[:, 120:]
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.2
    assert LIBRARY["transformers HQQ 2"].bytes_per_token(128) == 80
