import pytest
import torch
from pages import decode, encode, gaussian, page_format

from selfindex.codec.balanced import MAGNITUDES_4, MAGNITUDES_8, thresholds

# Distortion of the optimal 8- and 4-level quantisers of a unit Gaussian (Max, 1960, table I).
OPTIMAL = {MAGNITUDES_8: 0.03454, MAGNITUDES_4: 0.1175}


@pytest.mark.parametrize("levels", [MAGNITUDES_8, MAGNITUDES_4])
def test_levels_are_within_two_percent_of_the_best_for_a_gaussian(levels):
    x = gaussian(400_000)
    codes = torch.bucketize(x.abs(), torch.tensor(thresholds(levels)))
    table = torch.tensor(levels)
    error = (x.abs() - table[codes]).square().mean()
    assert error == pytest.approx(OPTIMAL[levels], rel=0.02)


@pytest.mark.parametrize("bits", [2, 3])
def test_decoded_gaussian_pages_are_as_close_as_the_quantiser_allows(bits):
    fmt = page_format(bits=bits, dim=256, page=64)
    keys, values = gaussian(4, 2, 64, 256, seed=1), gaussian(4, 2, 64, 256, seed=2)
    constants = torch.ones(1, 2, 256)
    index, payload, _ = encode(fmt, keys, values, constants=constants)
    got_keys, got_values = decode(fmt, index, payload, constants)

    def distortion(got, x):
        return float((got - x).square().mean() / x.square().mean())

    # Up to a few percent above the optimum: 8-bit scales, and values pay for being unbiased.
    assert 0.030 < distortion(got_keys, keys) < 0.037
    optimum = OPTIMAL[MAGNITUDES_8 if bits == 3 else MAGNITUDES_4]
    assert 0.85 * optimum < distortion(got_values, values) < 1.05 * optimum / (1 - optimum)


def test_values_are_unbiased_and_keys_have_least_error():
    fmt = page_format(dim=128, page=64)
    keys, values = gaussian(4, 2, 64, 128, seed=1), gaussian(4, 2, 64, 128, seed=2)
    constants = torch.ones(1, 2, 128)
    index, payload, _ = encode(fmt, keys, values, constants=constants)
    got_keys, got_values = decode(fmt, index, payload, constants)
    # Unbiased: projecting the decoded value on the original gives the original back.
    gain = (got_values * values).sum(-1) / values.square().sum(-1)
    assert gain.mean() == pytest.approx(1.0, abs=0.005)
    assert (gain - 1).abs().max() < 1 / 31
    # Least error: what is left over is orthogonal to the decoded key.
    centre = keys.mean(2, keepdim=True)
    gain = ((keys - centre) * (got_keys - centre)).sum(-1) / (got_keys - centre).square().sum(-1)
    assert gain.mean() == pytest.approx(1.0, abs=0.005)
