import pytest
import torch
from pages import HEAD_DIMS

from selfindex.codec.rotation import KEY_SEED, VALUE_SEED, hadamard, rotation, sign_diagonal
from selfindex.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_hadamard_rows_are_orthogonal(dim):
    matrix = hadamard(dim)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, dim * torch.eye(dim))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("seed", [KEY_SEED, VALUE_SEED])
def test_rotation_keeps_dot_products(dim, seed):
    matrix = rotation(dim, seed, CPU)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-5, rtol=0)


def test_sign_diagonals_are_pinned():
    # Part of format version 1: pages written by one release are read by the next.
    def text(seed):
        return "".join("+-"[int(s < 0)] for s in sign_diagonal(32, seed))

    assert text(KEY_SEED) == "---++---+-+-+-++----++++++--+---"
    assert text(VALUE_SEED) == "----++--+-++-+-++++++-++----++--"


def test_sign_diagonal_prefix_does_not_depend_on_the_length():
    assert torch.equal(sign_diagonal(256, KEY_SEED)[:64], sign_diagonal(64, KEY_SEED))


def test_splitmix64_reference_value():
    # First output of SplitMix64 seeded with 1 is 0x910a2dec89025cc1 (its top bit is set).
    assert sign_diagonal(1, 1).item() == -1.0


@pytest.mark.parametrize("dim", [0, 7, 36, 100])
def test_unknown_dimension_is_refused(dim):
    with pytest.raises(InputError, match="head_dim"):
        hadamard(dim)
