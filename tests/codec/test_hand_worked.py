"""One page whose bytes can be told in advance: data that lies exactly on the quantiser's levels."""

import pytest
import torch
from pages import PRESETS, array, decode, encode, gaussian, page_format

from selfindex.codec.balanced import MAGNITUDES_4, MAGNITUDES_8
from selfindex.codec.rotation import KEY_SEED, VALUE_SEED, rotation
from selfindex.codec.scales import decode_scales

DIM, PAGE, SCALE = 64, 8, 0.25
# In every 16 channels, how often each magnitude code occurs: about as in a Gaussian, so that the
# root mean square stays where no level changes its code.
KEY_CODES = [0, 1, 0, 2, 1, 0, 3, 1, 2, 0, 0, 1, 2, 0, 1, 2] * 4
VALUE_CODES = [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0] * 4
MAGNITUDES = {2: MAGNITUDES_4, 3: MAGNITUDES_8}


def signs_of(token):
    """+1 or -1 a channel, opposite in neighbouring tokens so that they cancel in the mean."""
    flip = -1 if token % 2 else 1
    return [flip * (1 if (i * 7 + token // 2) % 3 else -1) for i in range(DIM)]


def packed(numbers, bits):
    """Little-endian bit packing, spelled out."""
    per_byte = 8 // bits
    return [
        sum(n << (bits * i) for i, n in enumerate(numbers[start : start + per_byte]))
        for start in range(0, len(numbers), per_byte)
    ]


@pytest.fixture(params=[2, 3], ids=["v2", "v3"])
def page(request):
    bits = request.param
    fmt = page_format("balanced", bits, heads=1, dim=DIM, page=PAGE)
    signs = torch.tensor([signs_of(t) for t in range(PAGE)]).float()
    mean_code = torch.arange(DIM) * 2 - 63
    mean_code[-1] = 127
    value_codes = VALUE_CODES if bits == 2 else KEY_CODES
    coded_keys = signs * SCALE * torch.tensor(MAGNITUDES[3])[KEY_CODES] + 0.01 * mean_code
    coded_values = signs * SCALE * torch.tensor(MAGNITUDES[bits])[value_codes]
    balance = torch.linspace(0.5, 2, DIM).view(1, 1, DIM)
    device = torch.device("cpu")
    keys = coded_keys @ rotation(DIM, KEY_SEED, device) / balance[0]
    values = coded_values @ rotation(DIM, VALUE_SEED, device)
    index, payload, _ = encode(fmt, keys[None, None], values[None, None], constants=balance)
    return fmt, index, payload, balance, keys, values, mean_code, value_codes


def test_bytes_of_the_keys(page):
    fmt, index, payload, *_, mean_code, _ = page
    codes = array(fmt, index, "index", "codes")[0, 0]
    magnitudes = array(fmt, payload, "payload", "magnitudes")[0, 0]
    for token in range(PAGE):
        assert codes[token].tolist() == packed([int(s > 0) for s in signs_of(token)], 1)
        assert magnitudes[token].tolist() == packed(KEY_CODES, 2)
    assert array(fmt, index, "index", "mean")[0, 0].tolist() == mean_code.tolist()
    torch.testing.assert_close(array(fmt, index, "index", "mean_step").flatten(), torch.tensor([0.01]))
    base = array(fmt, index, "index", "key_base").flatten()
    scales = decode_scales(array(fmt, index, "index", "key_scale")[0, 0].flatten(), base)
    torch.testing.assert_close(scales, torch.full_like(scales, SCALE), rtol=1e-4, atol=0)


def test_bytes_of_the_values(page):
    fmt, _, payload, *_, value_codes = page
    stored = array(fmt, payload, "payload", "values")[0, 0]
    for token in range(PAGE):
        positive = [int(s > 0) for s in signs_of(token)]
        if fmt.value_bits == 3:
            signs = array(fmt, payload, "payload", "value_signs")[0, 0, token]
            assert signs.tolist() == packed(positive, 1)
            assert stored[token].tolist() == packed(value_codes, 2)
        else:
            # From the lowest to the highest level.
            both = [2 + code if up else 1 - code for code, up in zip(value_codes, positive, strict=True)]
            assert stored[token].tolist() == packed(both, 2)


def test_decoding_gives_the_data_back(page):
    fmt, index, payload, balance, keys, values, *_ = page
    got_keys, got_values = decode(fmt, index, payload, balance)
    torch.testing.assert_close(got_keys[0, 0], keys, atol=1e-4, rtol=0)
    torch.testing.assert_close(got_values[0, 0], values, atol=1e-4, rtol=0)


def test_paper_page_spelled_out():
    """Magnitudes over alpha and values, each between the least and largest of 32 channels."""
    fmt = page_format("paper", heads=1, dim=64, page=8)
    keys, values = gaussian(1, 1, 8, 64, seed=1), gaussian(1, 1, 8, 64, seed=2)
    index, payload, _ = encode(fmt, keys, values)
    mean = keys[0, 0].mean(0)
    alpha = (keys[0, 0] - mean).abs().amax(0)
    key_codes = array(fmt, payload, "payload", "magnitudes")[0, 0]
    value_codes = array(fmt, payload, "payload", "values")[0, 0]
    for x, stored in (((keys[0, 0] - mean).abs() / alpha, key_codes), (values[0, 0], value_codes)):
        for token in range(8):
            wanted = []
            for group in x[token].split(32):
                low, step = group.min(), (group.max() - group.min()) / 3
                wanted += ((group - low) / step).round().int().tolist()
            assert stored[token].tolist() == packed(wanted, 2)
    signs = array(fmt, index, "index", "codes")[0, 0, 5].tolist()
    assert signs == packed([int(k >= m) for k, m in zip(keys[0, 0, 5], mean, strict=True)], 1)


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_encoding_is_deterministic(preset, bits):
    fmt = page_format(preset, bits)
    keys, values = gaussian(2, 2, 16, 64, seed=1), gaussian(2, 2, 16, 64, seed=2)
    one, other = encode(fmt, keys, values), encode(fmt, keys, values)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
