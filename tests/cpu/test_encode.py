"""Compiled `encode` against the reference: its bytes, where rounding does not decide."""

import pytest
import torch
from pages import array, constants_for, decode, gaussian, page_format

from selfindex.backends import ops, reference

DIMS = (64, 80, 96, 128, 192, 256)


def raw(n, heads, page, dim, dtype):
    """Keys and values [n, H, P, d] with loud and quiet pages, a mean, and zeros; odd strides."""
    # Tokens before heads, as they leave a projection.
    x = gaussian(2, n, page, heads, dim, seed=dim) + torch.linspace(-1, 1, dim)
    x[:, 1] *= 1e-3
    x[:, 0, 2] = 0
    x[:, :, :, 0] *= 50
    x[:, -1, 0] = 0
    return x.to(dtype).transpose(2, 3)


def check(fmt, got, wanted, constants):
    """Bytes of codes, scales and means equal but for ties; the float32 fields to rounding. All of `paper`'s.

    Sums over channels and tokens are in another order here, so that a channel on a threshold or a
    scale between two bytes may fall to either side.
    """
    if fmt.preset == "paper":  # no sums
        assert all(map(torch.equal, got, wanted))
        return
    for plane, ours, theirs in zip(("index", "payload"), got, wanted, strict=True):
        assert ours.shape == theirs.shape
        rest = ours.clone(), theirs.clone()
        for name in getattr(fmt, plane).sections:
            mine, other = array(fmt, ours, plane, name), array(fmt, theirs, plane, name)
            for planes in rest:
                array(fmt, planes, plane, name).zero_()
            if mine.dtype == torch.float32:
                # A page of one token keeps what rounding its mean left over: a difference of near numbers.
                torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-36)
                continue
            assert (mine != other).sum() <= max(2, 2e-4 * mine.numel()), name
            if name in ("key_scale", "value_scale", "mean"):
                assert (mine.int() - other.int()).abs().max() <= 1, name
        assert torch.equal(*rest), "padding and counts"
    for mine, other in zip(decode(fmt, *got, constants), decode(fmt, *wanted, constants), strict=True):
        assert (mine - other).double().norm() <= 2e-3 * other.double().norm()


every_preset = pytest.mark.parametrize("preset", ["balanced", "paper"])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    ("preset", "bits", "dtype", "page", "heads"),
    [
        ("balanced", 2, torch.float32, 128, 2),
        ("balanced", 3, torch.bfloat16, 40, 3),
        ("balanced", 2, torch.float16, 8, 1),
        ("balanced", 3, torch.float32, 24, 1),
        ("paper", 2, torch.float32, 128, 2),
        ("paper", 2, torch.bfloat16, 40, 3),
        ("paper", 2, torch.float16, 8, 1),
    ],
)
def test_bytes_equal_the_reference_but_for_ties(isa, dim, preset, bits, dtype, page, heads):
    fmt = page_format(preset, bits, heads, dim, page)
    keys, values = raw(6, heads, page, dim, dtype)
    counts = torch.tensor([page, page, 1, 0, page - 3, page // 2 + 1], dtype=torch.int32)
    constants = constants_for(fmt, keys)
    got = ops.encode(keys, values, counts, constants, fmt.name)
    check(fmt, got, reference.encode(keys, values, counts, constants, fmt.name), constants)
    again = ops.encode(keys.contiguous(), values.contiguous(), counts, constants, fmt.name)
    assert all(map(torch.equal, got, again)), "strides do not matter"


@every_preset
def test_constants_per_page_and_counts_past_the_page(isa, preset):
    fmt = page_format(preset, 2, 2, 64, 16)
    keys, values = raw(3, 2, 16, 64, torch.float32)
    constants = constants_for(fmt, keys) * (0.5 + torch.arange(3)[:, None, None])
    counts = torch.tensor([16, 5, 99])
    got = ops.encode(keys, values, counts, constants, fmt.name)
    check(fmt, got, reference.encode(keys, values, counts, constants, fmt.name), constants)


@every_preset
def test_what_is_past_the_count_is_not_read(isa, preset):
    fmt = page_format(preset, 3 if preset == "balanced" else 2, 2, 96, 24)
    keys, values = raw(2, 2, 24, 96, torch.bfloat16).clone()
    counts = torch.tensor([20, 3], dtype=torch.int32)
    constants = constants_for(fmt, keys)
    wanted = ops.encode(keys, values, counts, constants, fmt.name)
    for b, n in enumerate(counts.tolist()):
        keys[b, :, n:], values[b, :, n:] = torch.nan, torch.inf
    assert all(map(torch.equal, ops.encode(keys, values, counts, constants, fmt.name), wanted))


@every_preset
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e5, 1e12])
def test_very_small_and_very_large_numbers(isa, preset, scale):
    fmt = page_format(preset, 2, 1, 64, 16)
    keys, values = scale * raw(2, 1, 16, 64, torch.float32)
    counts, constants = torch.full((2,), 16, dtype=torch.int32), constants_for(fmt, keys)
    got = ops.encode(keys, values, counts, constants, fmt.name)
    check(fmt, got, reference.encode(keys, values, counts, constants, fmt.name), constants)


def test_every_half_number_is_read_right(isa):
    # Subnormal numbers too: values of one channel, told apart by their scale.
    fmt = page_format("balanced", 3, 1, 64, 1024)
    bits = torch.arange(0, 0x7C00, 31, dtype=torch.int16)[:1024]
    values = torch.zeros(1, 1, 1024, 64, dtype=torch.float16)
    values[0, 0, :, 0] = bits.view(torch.float16)
    counts, constants = torch.tensor([1024], dtype=torch.int32), torch.ones(1, 1, 64)
    got = ops.encode(values, values, counts, constants, fmt.name)
    wanted = reference.encode(values, values, counts, constants, fmt.name)
    ours, theirs = (array(fmt, p, "payload", "value_scale") for p in (got[1], wanted[1]))
    assert torch.equal(ours, theirs)


def test_what_is_not_a_number_stays_one_in_the_paper_preset(isa):
    fmt = page_format("paper")
    keys, values = gaussian(2, 3, 2, 16, 64)
    constants, counts = constants_for(fmt, keys), torch.full((3,), 16, dtype=torch.int32)
    keys[0, 1, 3, 40], values[1, 0, 15, 5] = torch.nan, torch.nan
    keys[2, 0, 0, 9], values[2, 1, 7, 33] = torch.inf, -torch.inf
    got = ops.encode(keys, values, counts, constants, fmt.name)
    wanted = reference.encode(keys, values, counts, constants, fmt.name)
    for mine, other in zip(decode(fmt, *got, constants), decode(fmt, *wanted, constants), strict=True):
        assert other.isfinite().sum() < other.numel()
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@every_preset
def test_threads_do_not_change_the_bytes(isa, preset):
    fmt = page_format(preset, 2, 3, 64, 128)
    keys, values = raw(5, 3, 128, 64, torch.float32)
    counts, constants = torch.full((5,), 128, dtype=torch.int32), constants_for(fmt, keys)
    alone = ops.encode(keys, values, counts, constants, fmt.name)
    torch.set_num_threads(3)
    try:
        together = ops.encode(keys, values, counts, constants, fmt.name)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, alone, together))
