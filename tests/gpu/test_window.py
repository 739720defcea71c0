"""`window_attend` on the GPU against the reference."""

import pytest
import torch

from selfindex.backends import ops, reference

pytestmark = pytest.mark.gpu

SHAPES = [
    # dim, heads, groups, room, dtype
    (128, 8, 4, 208, torch.bfloat16),
    (64, 3, 3, 208, torch.float32),
    (96, 2, 5, 100, torch.float16),
    (256, 1, 16, 333, torch.bfloat16),
    (128, 2, 1, 1500, torch.float16),
    (80, 2, 2, 70, torch.float32),
]


@pytest.mark.parametrize(("dim", "heads", "groups", "room", "dtype"), SHAPES)
@pytest.mark.parametrize("with_sink", [False, True])
def test_window_agrees_with_the_reference(dim, heads, groups, room, dtype, with_sink):
    torch.manual_seed(dim + groups)
    lengths = torch.tensor([room - 1, 0, 17, room // 2], dtype=torch.int32, device="cuda")
    batch = len(lengths)

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    # Heads of a projection's output lie side by side, as in a model.
    query = normal(batch, 1, heads * groups, dim).to(dtype).transpose(1, 2)
    new_k, new_v = (normal(batch, 1, heads, dim).to(dtype).transpose(1, 2) for _ in range(2))
    keys, values = (normal(batch, heads, room, dim).to(dtype) for _ in range(2))
    for b, n in enumerate(lengths.tolist()):
        keys[b, :, n:], values[b, :, n:] = torch.nan, torch.nan
    part, lse = normal(batch, heads * groups, 1, dim), normal(batch, heads * groups, 1)
    part[1], lse[1] = 0, -torch.inf
    sink = normal(heads * groups) if with_sink else None
    copies = keys.clone(), values.clone()
    got = ops.window_attend(query, new_k, new_v, keys, values, lengths, part, lse, sink, dim**-0.5)
    wanted = reference.window_attend(query, new_k, new_v, *copies, lengths, part, lse, sink, dim**-0.5)
    assert got.dtype == dtype
    assert got.shape == (batch, 1, heads * groups, dim)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), atol=tolerance, rtol=tolerance)
    for mine, other in zip((keys, values), copies, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
