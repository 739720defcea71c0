"""Compiled `prompt_statistics` against the reference."""

import pytest
import torch
from pages import HEAD_DIMS, gaussian

from selfindex.backends import ops, reference


def check(keys):
    got, wanted = ops.prompt_statistics(keys), reference.prompt_statistics(keys)
    d = keys.shape[2]
    parts = zip(got.split((d, d, 16 * d), 1), wanted.split((d, d, 16 * d), 1), strict=True)
    for mine, other in parts:
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-6 * float(keys.float().abs().amax()))
    return got


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 1), (3, 700), (2, 5000)])
def test_statistics_agree_with_the_reference(isa, dim, dtype, heads, tokens):
    # Tokens before heads, as they leave a projection; a loud channel and one that is always the same.
    keys = gaussian(tokens, heads, dim, seed=dim) + torch.linspace(-1, 1, dim)
    keys[..., 1] *= 50
    keys[..., 7] = 0.5
    check(keys.to(dtype).transpose(0, 1))


def test_prompts_together_are_as_each_alone(isa):
    keys = gaussian(2, 2500, 3, 64).transpose(1, 2)
    assert torch.equal(ops.prompt_statistics(keys), torch.stack([check(own) for own in keys]))


def test_a_code_nobody_has(isa):
    check(gaussian(2, 3, 64))


def test_threads_and_strides_do_not_change_them(isa):
    keys = gaussian(2, 6000, 64)
    alone = check(keys)
    assert torch.equal(check(keys.transpose(1, 2).contiguous().transpose(1, 2)), alone)
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.prompt_statistics(keys), alone)
    finally:
        torch.set_num_threads(1)
