"""Data that quantisers like to divide by zero on."""

import pytest
import torch
from pages import PRESETS, decode, encode, gaussian, page_format, relative_error


@pytest.fixture(params=PRESETS, ids=lambda p: f"{p[0]}-{p[1]}")
def fmt(request):
    return page_format(*request.param)


def shape(fmt, pages=2):
    return pages, fmt.kv_heads, fmt.page_size, fmt.head_dim


def test_zero_vectors_decode_to_zero(fmt):
    keys, values = torch.zeros(shape(fmt)), torch.zeros(shape(fmt))
    index, payload, constants = encode(fmt, keys, values)
    got_keys, got_values = decode(fmt, index, payload, constants)
    assert not got_keys.any()
    assert not got_values.any()


def test_one_zero_token_among_others(fmt):
    keys, values = gaussian(*shape(fmt), seed=1), gaussian(*shape(fmt), seed=2)
    values[0, 0, 3] = 0
    index, payload, constants = encode(fmt, keys, values)
    got_keys, got_values = decode(fmt, index, payload, constants)
    assert not got_values[0, 0, 3].any()
    assert torch.isfinite(got_keys).all()
    assert relative_error(got_values, values) < 0.4


def test_identical_tokens_decode_to_themselves(fmt):
    keys = gaussian(1, fmt.kv_heads, 1, fmt.head_dim, seed=1).expand(shape(fmt)).contiguous()
    index, payload, constants = encode(fmt, keys, keys)
    got, _ = decode(fmt, index, payload, constants)
    # Everything is in the mean, which balanced keeps in 8 bits and paper in float32.
    assert relative_error(got, keys) < 0.01


def test_constant_channels(fmt):
    keys, values = gaussian(*shape(fmt), seed=1), gaussian(*shape(fmt), seed=2)
    keys[..., :8], values[..., :8] = 5.0, -3.0
    index, payload, constants = encode(fmt, keys, values)
    got_keys, got_values = decode(fmt, index, payload, constants)
    assert torch.isfinite(got_keys).all()
    assert torch.isfinite(got_values).all()
    assert relative_error(got_keys, keys) < 0.25
    if fmt.preset == "paper":
        # Nothing is left of a constant channel once it is centred.
        torch.testing.assert_close(got_keys[..., :8], keys[..., :8], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_scale_of_the_data_does_not_matter(fmt, size):
    keys, values = gaussian(*shape(fmt), seed=1), gaussian(*shape(fmt), seed=2)
    plain = decode(fmt, *encode(fmt, keys, values))
    scaled = decode(fmt, *encode(fmt, keys * size, values * size))
    for got, wanted in zip(scaled, plain, strict=True):
        # Half-precision zero points of the paper preset lose digits at the small end.
        assert relative_error(got / size, wanted) < 0.08


def test_tokens_of_very_different_size_share_a_page(fmt):
    keys, values = gaussian(*shape(fmt), seed=1), gaussian(*shape(fmt), seed=2)
    size = torch.logspace(-2, 2, fmt.page_size)[:, None]
    _, got = decode(fmt, *encode(fmt, keys, values * size))
    error = (got - values * size).norm(dim=-1) / (values * size).norm(dim=-1)
    assert error.max() < 0.55
