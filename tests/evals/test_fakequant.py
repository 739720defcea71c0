"""Simulated encodings do what their options say."""

import pytest
import torch

from evals.fakequant import KeySpec, encode_keys, lloyd, nearest, rotary_mean, shaped_codes

HEADS, N, D = 2, 256, 64


@pytest.fixture
def x():
    return torch.randn(HEADS, N, D, generator=torch.Generator().manual_seed(0))


def decoded(x, fit, search=False):
    code, scale = lloyd(x, 3, D, fit, 128, search)
    return (code * scale[..., None]).flatten(2)


def test_scales_fit_what_they_are_named_for(x):
    length, product = (x.norm(dim=-1), x.square().sum(-1))
    rounding = {"rtol": 0.04, "atol": 0}
    torch.testing.assert_close(decoded(x, "norm").norm(dim=-1), length, **rounding)
    torch.testing.assert_close((decoded(x, "unbiased") * x).sum(-1), product, **rounding)
    errors = {fit: (decoded(x, fit) - x).square().sum() for fit in ("mse", "norm", "unbiased")}
    assert errors["mse"] < errors["norm"] < errors["unbiased"]


def test_searched_levels_are_nearer(x):
    assert (decoded(x, "mse", True) - x).square().sum() < 0.97 * (decoded(x, "mse") - x).square().sum()


def test_shaped_errors_are_small_where_the_metric_is_large(x):
    weight = torch.logspace(-1, 1, D).expand(HEADS, D)
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1))).Q
    scale = (x.square().mean(-1, keepdim=True)).sqrt()

    def error(code):
        return (((code * scale - x) @ rotation).square() * weight[:, None]).sum()

    plain = torch.copysign(nearest(x.abs() / scale, 3), x)
    assert error(shaped_codes(x, scale, 3, weight, rotation)) < 0.8 * error(plain)


def test_a_constant_key_before_rope_is_its_rotary_mean():
    frequencies = 1e4 ** (-torch.arange(D // 2) / (D // 2))
    angle = torch.arange(16, 16 + N)[:, None] * frequencies
    a, b = torch.randn(2, HEADS, 1, D // 2, generator=torch.Generator().manual_seed(2))
    k = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    torch.testing.assert_close(rotary_mean(k, frequencies, 16), k, rtol=1e-4, atol=1e-4)
    _, stored, _ = encode_keys(k, KeySpec(rotary=True), None, frequencies=frequencies, start=16)
    torch.testing.assert_close(stored, k, rtol=1e-3, atol=1e-3)
