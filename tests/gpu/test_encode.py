"""`encode` on the GPU: the reference's bytes, up to ties that rounding decides."""

import pytest
import torch
from pages import PRESETS, constants_for, relative_error

from selfindex.backends import ops, reference
from selfindex.codec import PageFormat, codec_for

pytestmark = pytest.mark.gpu


def decoded(fmt, index, payload, constants):
    codec, n = codec_for(fmt.name), index.shape[0]
    block = torch.arange(n, device="cuda")[:, None, None].expand(n, 1, 128)
    offset = torch.arange(128, device="cuda").expand(n, 1, 128)
    return (
        codec.read_keys(index, payload, block, offset, constants),
        codec.read_values(index, payload, block, offset),
    )


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_equal_the_reference_up_to_ties(dim, preset, bits, dtype):
    fmt = PageFormat(preset, 3, dim, 128, bits)
    generator = torch.Generator("cuda").manual_seed(dim)
    # Tokens before heads, as they leave a projection: the kernel takes any strides.
    raw = torch.randn(2, 9, 128, 3, dim, generator=generator, device="cuda") + torch.linspace(
        -1, 1, dim, device="cuda"
    )
    raw[:, 4] *= 1e-3
    raw[:, 5, 7] = 0
    keys, values = raw.to(dtype).transpose(2, 3)
    counts = torch.tensor([128, 128, 1, 77, 128, 128, 0, 128, 127], dtype=torch.int32, device="cuda")
    # Of one page: others go beyond its largest keys.
    constants = constants_for(fmt, keys[:1]).cuda()
    torch.cuda.empty_cache()
    poison = torch.full((1 << 24,), 0x5A, dtype=torch.uint8, device="cuda")
    del poison
    got = ops.encode(keys, values, counts, constants, fmt.name)
    wanted = reference.encode(keys, values, counts, constants, fmt.name)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert (a != b).float().mean() < 2e-3
    for a, b in zip(decoded(fmt, *got, constants), decoded(fmt, *wanted, constants), strict=True):
        assert relative_error(a, b) < 5e-3
    again = ops.encode(keys, values, counts, constants, fmt.name)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])
