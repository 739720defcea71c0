import pytest
import torch
from pages import gaussian

from selfindex.codec import PageFormat, codec_for, packing
from selfindex.codec.paper import prompt_statistics


def statistics(keys):
    codec = codec_for(PageFormat("paper", keys.shape[0], keys.shape[2], 16).name)
    return [x[0] for x in codec.split(prompt_statistics(keys)[None])]


def test_statistics_are_mean_largest_magnitude_and_mean_of_each_code():
    keys = gaussian(2, 100, 64) + 1
    mean, alpha, codebook = statistics(keys)
    torch.testing.assert_close(mean, keys.mean(1))
    centred = keys - keys.mean(1, keepdim=True)
    torch.testing.assert_close(alpha, centred.abs().amax(1))
    codes = packing.group_codes(packing.pack_bits(centred >= 0))
    for head, group in ((0, 0), (1, 15)):
        sub = centred[head, :, 4 * group : 4 * group + 4]
        for code in range(16):
            members = sub[codes[head, :, group] == code]
            if len(members):
                torch.testing.assert_close(codebook[head, group, code], members.mean(0))


def test_a_code_nobody_has_gets_its_signs_times_the_mean_magnitude():
    keys = gaussian(1, 3, 64)  # three tokens use at most 3 of 16 codes
    mean, _, codebook = statistics(keys)
    assert torch.isfinite(codebook).all()
    centred = keys[0] - mean[0]
    codes = packing.group_codes(packing.pack_bits(centred >= 0))
    unused = next(c for c in range(16) if c not in codes[:, 0].tolist())
    signs = torch.tensor([1.0 if unused >> i & 1 else -1.0 for i in range(4)])
    torch.testing.assert_close(codebook[0, 0, unused], signs * centred[:, :4].abs().mean(0))


def test_one_token_has_statistics():
    mean, alpha, codebook = statistics(gaussian(2, 1, 64))
    assert torch.equal(mean, gaussian(2, 1, 64)[:, 0])
    assert not alpha.any()
    assert not codebook.any()


@pytest.mark.parametrize("ends", [(-1e5, 1e5), (1e5, 2.5e5), (-2.5e5, -1e5), (-2.5e5, 1.0), (-7e4, -6.6e4)])
def test_values_beyond_half_precision_are_near(ends):
    codec = codec_for(PageFormat("paper", 1, 64, 16).name)
    low, high = ends
    keys = gaussian(1, 1, 16, 64)
    values = low + (high - low) * torch.rand(1, 1, 16, 64, generator=torch.Generator().manual_seed(0))
    planes = codec.encode(keys, values, torch.tensor([16]), prompt_statistics(keys[0])[None])
    at = torch.zeros(1, 1, 16, dtype=torch.long), torch.arange(16)[None, None]
    error = (codec.read_values(planes[0], planes[1], *at)[0] - values[0]).abs().max()
    assert error <= (high - low) / 3


@pytest.mark.parametrize("size", [1e-40, 1e-9, 1e6, 1e30])
def test_values_and_later_keys_of_any_size_decode_to_numbers(size):
    codec = codec_for(PageFormat("paper", 1, 64, 16).name)
    prompt = gaussian(1, 1, 16, 64)
    prompt[..., 3], prompt[..., 4] = 0.1, 1e-40  # channels with next to no range
    later = size * gaussian(1, 1, 16, 64, seed=1)
    planes = codec.encode(later, later, torch.tensor([16]), constants := prompt_statistics(prompt[0])[None])
    at = torch.zeros(1, 1, 16, dtype=torch.long), torch.arange(16)[None, None]
    assert torch.isfinite(codec.read_keys(*planes, *at, constants)).all()
    assert torch.isfinite(codec.read_values(*planes, *at)).all()
