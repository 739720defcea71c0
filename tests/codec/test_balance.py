import pytest
import torch
from pages import gaussian
from safetensors.torch import save_file

from selfindex import BalanceProfile, FormatError
from selfindex.codec.balance import LIMIT, measure_balance


def test_balance_is_the_root_of_query_over_key_size_per_rope_pair():
    spread = torch.linspace(0.7, 1.4, 32).repeat(2)
    keys = gaussian(1, 1, 20_000, 64) * spread
    balance = measure_balance(keys, torch.ones(1, 64))
    wanted = (1 / spread).sqrt()
    wanted = wanted / wanted[:32].median()
    torch.testing.assert_close(balance, wanted[None], rtol=0.02, atol=0)


def test_a_rope_pair_counts_with_both_its_channels():
    keys, square = gaussian(1, 1, 5_000, 64), torch.ones(1, 64)
    keys[..., 3] *= 0.1
    keys[..., 35] *= 3
    square[:, 37] = 9
    balance = measure_balance(keys, square)
    assert balance[0, 3] == pytest.approx(((0.1**2 + 3**2) / 2) ** -0.25, rel=0.03)
    assert balance[0, 5] == pytest.approx(((1 + 9) / 2) ** 0.25, rel=0.03)


def test_both_channels_of_a_rope_pair_share_their_balance():
    balance = measure_balance(gaussian(2, 3, 50, 64), torch.rand(3, 64))
    assert balance.shape == (3, 64)
    assert torch.equal(balance[:, :32], balance[:, 32:])


def test_balance_is_limited():
    keys = gaussian(1, 1, 50, 64)
    keys[..., 0] *= 1e4
    keys[..., 1] *= 1e-4
    keys[..., 32:34] = keys[..., :2]
    balance = measure_balance(keys, torch.ones(1, 64))
    assert balance.min() == 1 / LIMIT
    assert balance.max() == LIMIT
    assert measure_balance(keys, torch.ones(1, 64), limit=2).max() == 2


@pytest.mark.parametrize("silent", ["keys", "queries", "both"])
def test_silent_channels_have_a_balance(silent):
    keys, square = gaussian(1, 2, 50, 64), torch.ones(2, 64)
    if silent != "queries":
        keys[..., [0, 32]] = 3.0
    if silent != "keys":
        square[:, [5, 37]] = 0.0
    balance = measure_balance(keys, square)
    assert torch.isfinite(balance).all()
    assert (balance > 0).all()


def test_keys_without_any_spread_have_a_balance():
    assert torch.equal(measure_balance(torch.zeros(1, 2, 1, 64), torch.zeros(2, 64)), torch.ones(2, 64))


def test_profile_round_trip(tmp_path):
    profile = BalanceProfile({0: torch.rand(2, 64) + 0.5, 3: torch.rand(1, 128) + 0.5})
    profile.save(tmp_path / "profile.safetensors")
    loaded = BalanceProfile.load(tmp_path / "profile.safetensors")
    assert loaded.balance.keys() == profile.balance.keys()
    assert all(torch.equal(loaded.balance[i], s) for i, s in profile.balance.items())


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "profile.safetensors"
    BalanceProfile({0: torch.ones(2, 64)}).save(path)
    return path


def test_missing_profile_is_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot read"):
        BalanceProfile.load(tmp_path / "nothing")


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b"\xff" * 8 + b[8:], lambda b: b""])
def test_damaged_profile_is_refused(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(FormatError, match="cannot read"):
        BalanceProfile.load(saved)


@pytest.mark.parametrize("meta", [None, {"format": "other"}, {"format": "selfindex-profile", "version": "9"}])
def test_other_safetensors_files_are_refused(tmp_path, meta):
    save_file({"layers.0.balance": torch.ones(2, 64)}, tmp_path / "file", metadata=meta)
    with pytest.raises(FormatError, match="not a selfindex profile"):
        BalanceProfile.load(tmp_path / "file")


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_profile_with_impossible_numbers_is_refused(tmp_path, bad):
    balance = torch.ones(2, 64)
    balance[1, 3] = bad
    BalanceProfile({0: balance}).save(tmp_path / "file")
    with pytest.raises(FormatError, match="not positive"):
        BalanceProfile.load(tmp_path / "file")


def test_profile_with_foreign_tensor_names_is_refused(tmp_path):
    meta = {"format": "selfindex-profile", "version": "1"}
    save_file({"weights": torch.ones(2, 64)}, tmp_path / "file", metadata=meta)
    with pytest.raises(FormatError):
        BalanceProfile.load(tmp_path / "file")
