"""`decode_pages` against the codec, and attention over what it gives against `dense_attend`."""

import pytest
import torch
from pages import HEAD_DIMS, PRESETS, block_table, decode, encode, gaussian, page_format

from selfindex.backends import ops

LENGTHS = (70, 0, 33, 64)


def stored(preset, bits, dim, shared=False):
    """Pages of rows of `LENGTHS` tokens: (format, index, payload, table, counts, constants)."""
    fmt = page_format(preset, bits, 2, dim)
    keys, values = gaussian(16, 2, 16, dim, seed=1), gaussian(16, 2, 16, dim, seed=2)
    index, payload, constants = encode(fmt, keys, values)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).int()
    return fmt, index, payload, *block_table(LENGTHS, order, 16, (1, 2), shared), constants


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_tokens_of_all_rows_lie_one_behind_the_other(preset, bits, dim):
    fmt, index, payload, table, counts, constants = stored(preset, bits, dim)
    whole = decode(fmt, index, payload, constants)
    tokens, first = counts.sum(1), torch.tensor([3, 90, 100, 160], dtype=torch.int32)
    got = torch.full((2, 2, 230, dim), 7.0)
    ops.decode_pages(index, payload, table, counts, first, *got, constants, fmt.name)
    used = torch.zeros(230, dtype=torch.bool)
    for b, n in enumerate(tokens.tolist()):
        used[first[b] : first[b] + n] = True
        for each, pages in zip(got, whole, strict=True):
            cut = [pages[block, :, :count] for block, count in zip(table[b], counts[b], strict=True)]
            torch.testing.assert_close(each[:, first[b] : first[b] + n], torch.cat(cut, 1))
    assert (got[:, :, ~used] == 7).all(), "nothing else is written to"


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_what_has_no_place_is_left_out(preset, bits):
    fmt, index, payload, table, counts, constants = stored(preset, bits, 64)
    first, inner = torch.tensor([-5, 0, 190, 80], dtype=torch.int32), torch.full((2, 2, 200, 64), 7.0)
    ops.decode_pages(index, payload, table, counts, first, *inner, constants, fmt.name)
    outer = torch.full((2, 2, 300, 64), 7.0)
    ops.decode_pages(index, payload, table, counts, first + 20, *outer, constants, fmt.name)
    torch.testing.assert_close(inner, outer[:, :, 20:220])


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_over_the_tokens_is_that_over_the_pages(preset, bits, dtype):
    fmt, index, payload, table, counts, constants = stored(preset, bits, 64)
    constants = torch.cat([constants * factor for factor in (1, 2, 1.5, 1)])
    query = gaussian(4, 4, 9, 64, seed=3)
    wanted, sums = ops.dense_attend(query, index, payload, table, counts, constants, 0.125, fmt.name)
    keys, values = torch.zeros(2, 2, 4 * 80, 64, dtype=dtype)
    first = torch.arange(0, 320, 80)
    ops.decode_pages(index, payload, table, counts, first, keys, values, constants, fmt.name)
    for b, n in enumerate(counts.sum(1).tolist()):
        k, v = (x[:, 80 * b : 80 * b + n].float().repeat_interleave(2, 0) for x in (keys, values))
        logits = query[b] @ k.transpose(1, 2) * 0.125
        torch.testing.assert_close(logits.softmax(-1) @ v, wanted[b], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(logits.logsumexp(-1), sums[b], atol=2e-2, rtol=2e-2)


def test_numbers_too_large_for_the_dtype_are_cut_off():
    fmt, index, payload, table, counts, constants = stored("paper", 2, 64)
    constants[:, :, 64:128] = 1e7
    keys, values = torch.zeros(2, 2, 300, 64, dtype=torch.float16)
    first = torch.tensor([0, 0, 100, 200])
    ops.decode_pages(index, payload, table, counts, first, keys, values, constants, fmt.name)
    assert keys.isfinite().all()
    assert keys.abs().max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_are_merged_into_a_place(sink, dtype):
    logits, values = gaussian(2, 4, 3, 50), gaussian(2, 4, 50, 64, seed=1)
    logit = gaussian(4, seed=2) if sink else None
    parts = [logits[..., :20], logits[..., 20:20], logits[..., 20:]]
    bounds = (slice(20), slice(0), slice(20, 50))
    outputs = [x.softmax(-1) @ values[:, :, at] for x, at in zip(parts, bounds, strict=True)]
    outputs[1][:] = 5.0  # anything: the part has no keys
    place = torch.full((2, 9, 4, 64), 7.0, dtype=dtype)
    out = place[:, 4:7].transpose(1, 2)
    total = ops.merge_into(outputs, [x.logsumexp(-1) for x in parts], logit, out)
    if sink:
        logits = torch.cat((logits, logit.view(1, 4, 1, 1).expand(2, 4, 3, 1)), -1)
    wanted = logits.softmax(-1)[..., :50] @ values
    torch.testing.assert_close(out.float(), wanted, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)
    torch.testing.assert_close(total, logits.logsumexp(-1))
    assert (place[:, :4] == 7).all()
    assert (place[:, 7:] == 7).all()
