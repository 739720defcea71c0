import pytest
import torch
from pages import (
    HEAD_DIMS,
    PRESETS,
    array,
    constants_for,
    decode,
    encode,
    gaussian,
    page_format,
    relative_error,
)

from selfindex.codec import packing
from selfindex.codec.rotation import KEY_SEED, rotation

# Largest relative error of Gaussian data: (keys, values).
BOUNDS = {("balanced", 2): (0.22, 0.40), ("balanced", 3): (0.22, 0.22), ("paper", 2): (0.40, 0.40)}


def data(fmt, pages=3, dtype=torch.float32):
    shape = (pages, fmt.kv_heads, fmt.page_size, fmt.head_dim)
    # Keys have a mean per channel, as real ones do.
    centre = 2 * gaussian(1, fmt.kv_heads, 1, fmt.head_dim, seed=3)
    return (gaussian(*shape, seed=1) + centre).to(dtype), gaussian(*shape, seed=2).to(dtype)


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_round_trip(preset, bits, dim):
    fmt = page_format(preset, bits, heads=3, dim=dim, page=32)
    keys, values = data(fmt)
    index, payload, constants = encode(fmt, keys, values)
    got_keys, got_values = decode(fmt, index, payload, constants)
    key_bound, value_bound = BOUNDS[preset, bits]
    # Errors are relative to what is left of the keys once they are centred.
    assert float((got_keys - keys).norm()) < key_bound * float((keys - keys.mean(2, keepdim=True)).norm())
    assert relative_error(got_values, values) < value_bound


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_planes_are_multiples_of_256_bytes(preset, bits, heads, dim):
    fmt = page_format(preset, bits, heads=heads, dim=dim, page=256)
    assert fmt.index_bytes % 256 == 0
    assert fmt.payload_bytes % 256 == 0
    if preset == "balanced":
        # 3 bits of key, the value bits, 2 bytes of scales, and a little per page.
        token = heads * (dim * (3 + bits) / 8 + 2)
        assert (fmt.index_bytes + fmt.payload_bytes) / 256 < token + heads * (dim + 32) / 256 + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_half_precision_input_gives_the_bytes_of_its_float32_value(preset, bits, dtype):
    fmt = page_format(preset, bits)
    keys, values = data(fmt, dtype=dtype)
    constants = constants_for(fmt, keys.float())
    one = encode(fmt, keys, values, constants=constants)
    other = encode(fmt, keys.float(), values.float(), constants=constants)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_a_page_is_self_contained(preset, bits):
    fmt = page_format(preset, bits)
    keys, values = data(fmt, pages=4)
    index, payload, constants = encode(fmt, keys, values)
    for page in range(4):
        at = slice(page, page + 1)
        alone = encode(fmt, keys[at], values[at], constants=constants)
        assert torch.equal(alone[0], index[at])
        assert torch.equal(alone[1], payload[at])
    # Bytes copied elsewhere decode to the same tokens.
    order = torch.tensor([2, 0, 3, 1])
    moved = decode(fmt, index[order].clone(), payload[order].clone(), constants)
    for got, wanted in zip(moved, decode(fmt, index, payload, constants), strict=True):
        assert torch.equal(got, wanted[order])


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_short_pages_ignore_what_is_past_their_count(preset, bits):
    fmt = page_format(preset, bits)
    keys, values = data(fmt, pages=1)
    constants = constants_for(fmt, keys)
    counts = torch.tensor([5], dtype=torch.int32)
    index, payload, _ = encode(fmt, keys, values, counts, constants)
    assert fmt.count(index).tolist() == [5]
    junk_keys, junk_values = keys.clone(), values.clone()
    junk_keys[:, :, 5:], junk_values[:, :, 5:] = 1e4, -1e4
    other = encode(fmt, junk_keys, junk_values, counts, constants)
    assert torch.equal(other[0], index)
    assert torch.equal(other[1], payload)
    got_keys, got_values = decode(fmt, index, payload, constants)
    centred = keys[:, :, :5] - keys[:, :, :5].mean(2, keepdim=True)
    if preset == "balanced":
        # The mean is that of the five tokens.
        assert (got_keys[:, :, :5] - keys[:, :, :5]).norm() < 0.22 * centred.norm()
    assert relative_error(got_keys[:, :, :5], keys[:, :, :5]) < 0.4
    assert relative_error(got_values[:, :, :5], values[:, :, :5]) < 0.4


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_full_pages_say_so(preset, bits):
    fmt = page_format(preset, bits)
    index, _, _ = encode(fmt, *data(fmt))
    assert fmt.count(index).tolist() == [fmt.page_size] * 3


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_sign_codes_are_the_signs_of_the_decoded_centred_keys(preset, bits):
    fmt = page_format(preset, bits)
    index, payload, constants = encode(fmt, *data(fmt))
    got, _ = decode(fmt, index, payload, constants)
    if preset == "paper":
        centred = got - constants[:, :, None, : fmt.head_dim]
    else:
        coded = (got * constants[:, :, None]) @ rotation(fmt.head_dim, KEY_SEED, got.device).T
        step = array(fmt, index, "index", "mean_step")[..., None]
        centred = coded - (array(fmt, index, "index", "mean") * step)[:, :, None]
    signs = packing.unpack_bits(array(fmt, index, "index", "codes"))
    # Magnitudes that decode to nothing have no sign.
    some = centred.abs() > 1e-4
    assert some.float().mean() > 0.7
    assert torch.equal(signs[some], (centred >= 0)[some])
