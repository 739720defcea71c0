import torch
from hypothesis import given
from hypothesis import strategies as st

from selfindex.codec.scales import LARGEST, decode_scales, encode_scales

positive = st.floats(2.0**-20, 2.0**20, width=32)


@given(st.lists(positive, min_size=1, max_size=40))
def test_error_is_bounded_relative_to_each_scale(numbers):
    scales = torch.tensor(numbers)
    codes, base = encode_scales(scales)
    error = (decode_scales(codes, base[..., None]) - scales).abs()
    large = scales > base * 2**-14
    # A little float32 rounding comes on top of 1/32.
    assert (error[large] <= scales[large] / 32 * 1.0001).all()
    assert (error <= base * 2**-14).logical_or(large).all()


@given(st.lists(positive, min_size=2, max_size=20))
def test_order_is_kept(numbers):
    scales = torch.tensor(sorted(numbers))
    codes, _ = encode_scales(scales)
    assert (codes.int().diff() >= 0).all()


def test_largest_scale_of_a_base_is_exact_to_rounding():
    scales = torch.rand(4, 8) + 0.1
    codes, base = encode_scales(scales)
    assert (codes.amax(-1) == 255).all()
    torch.testing.assert_close(base * LARGEST, scales.amax(-1))


def test_every_byte_decodes_to_a_distinct_ascending_value():
    values = decode_scales(torch.arange(256, dtype=torch.uint8), torch.ones(1))
    assert values[0] == 0
    assert values[255] == LARGEST
    assert (values.diff() > 0).all()


def test_every_byte_survives_a_round_trip():
    codes = torch.arange(256, dtype=torch.uint8)
    again, base = encode_scales(decode_scales(codes, torch.tensor([3.0])))
    assert torch.equal(again, codes)
    torch.testing.assert_close(base, torch.tensor(3.0))


def test_zero_scales():
    codes, base = encode_scales(torch.zeros(3, 8))
    assert not codes.any()
    assert not decode_scales(codes, base[..., None]).any()


def test_bases_are_shared_over_the_given_dimensions():
    scales = torch.rand(2, 3, 4) + 0.1
    codes, base = encode_scales(scales, (-2, -1))
    assert base.shape == (2,)
    torch.testing.assert_close(decode_scales(codes, base[:, None, None]), scales, rtol=1 / 31, atol=0)
