"""`prompt_statistics` on the GPU against the reference."""

import pytest
import torch
from pages import relative_error

from selfindex.backends import ops, reference
from selfindex.backends.fallback import observed

pytestmark = pytest.mark.gpu


def keys_of(heads, tokens, dim, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    keys = torch.randn(heads, tokens, dim, generator=generator, device="cuda")
    return (keys + torch.linspace(-1, 1, dim, device="cuda")).to(dtype)


def check(keys, fast=True):
    seen = []
    with observed(lambda name, served, _: seen.append(served)):
        got = ops.prompt_statistics(keys)
    assert seen == [fast]
    wanted = reference.prompt_statistics(keys)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    dim = keys.shape[-1]
    assert torch.equal(got[..., : 2 * dim], wanted[..., : 2 * dim]), "mean and largest are PyTorch's"
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(ops.prompt_statistics(keys), got), "the result does not depend on timing"


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 200, 5000])
def test_statistics_are_the_references(dim, dtype, tokens):
    check(keys_of(3, tokens, dim, dtype))


def test_keys_may_lie_apart_and_codes_be_unused():
    keys = keys_of(2, 3000, 2 * 128, torch.bfloat16)[..., :128]
    keys[:, :, :8] = keys[:, :, :8].abs()
    keys[:, :, 4] = 2.0
    check(keys)
    check(keys.transpose(0, 1).contiguous().transpose(0, 1))


def test_prompts_together_are_as_each_alone():
    keys = torch.stack([keys_of(2, 3000, 128, torch.bfloat16, seed) for seed in range(3)])
    check(keys)
    alone = [ops.prompt_statistics(own) for own in keys]
    assert torch.equal(ops.prompt_statistics(keys), torch.stack(alone))


def test_keys_that_begin_anywhere_are_the_references():
    check(keys_of(2, 500, 129, torch.bfloat16)[..., 1:], fast=False)


@pytest.mark.slow
def test_a_long_prompt_takes_little_memory():
    keys = keys_of(8, 128 << 10, 128, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = ops.prompt_statistics(keys)
    assert torch.cuda.max_memory_allocated() - before < keys.nbytes
    assert relative_error(got, reference.prompt_statistics(keys)) < 1e-5
