"""Scores against keys read back from the index plane alone."""

import pytest
import torch
from pages import PRESETS, array, decode, encode, gaussian, page_format

from selfindex.backends import ops
from selfindex.codec import codec_for, packing
from selfindex.codec.balanced import SIGN_GAIN
from selfindex.codec.rotation import KEY_SEED, rotation
from selfindex.codec.scales import decode_scales


def index_only_keys(fmt, index, constants):
    """What the index knows of each key, [n, H, P, d], in the model's own domain; plain loops."""
    bits = packing.unpack_bits(array(fmt, index, "index", "codes"))
    if fmt.preset == "paper":
        mean, _, codebook = codec_for(fmt.name).split(constants)
        codes = packing.group_codes(array(fmt, index, "index", "codes")).long()
        parts = [
            torch.stack([codebook[0, h, g][codes[:, h, :, g]] for h in range(fmt.kv_heads)], 1)
            for g in range(fmt.head_dim // 4)
        ]
        return torch.cat(parts, -1) + mean[:, :, None]
    base = array(fmt, index, "index", "key_base")[..., None]
    scale = decode_scales(array(fmt, index, "index", "key_scale"), base)
    step = array(fmt, index, "index", "mean_step")[..., None]
    mean = array(fmt, index, "index", "mean") * step
    coded = (bits.float() * 2 - 1) * SIGN_GAIN * scale[..., None] + mean[:, :, None]
    return coded @ rotation(fmt.head_dim, KEY_SEED, index.device) / constants[:, :, None]


@pytest.fixture(params=PRESETS, ids=lambda p: f"{p[0]}-{p[1]}")
def stored(request):
    fmt = page_format(*request.param, heads=2, dim=64, page=16)
    keys = gaussian(5, 2, 16, 64, seed=1) + gaussian(1, 2, 1, 64, seed=2)
    values = gaussian(5, 2, 16, 64, seed=3)
    return fmt, *encode(fmt, keys, values), keys


# Two rows: the first of three pages, the last cut to 5 tokens; the second of two, one shared.
TABLE = torch.tensor([[4, 0, 2], [0, 3, 0]], dtype=torch.int32)
COUNTS = torch.tensor([[16, 16, 5], [16, 16, 0]], dtype=torch.int32)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("new", [1, 4])
def test_score_is_the_logit_of_index_only_keys(stored, groups, new):
    fmt, index, _, constants, _ = stored
    query = gaussian(2, 2 * groups, new, 64, seed=7)
    rows = constants.expand(2, -1, -1).contiguous()
    got = ops.score(query, index, TABLE, COUNTS, rows, 0.125, fmt.name)
    assert got.shape == (2, 2 * groups, new, 48)
    known = index_only_keys(fmt, index, constants)
    for b in range(2):
        row = torch.cat([known[block] for block in TABLE[b]], 1)  # [H, S, d]
        for head in range(2 * groups):
            wanted = query[b, head] @ row[head // groups].T * 0.125
            real = torch.cat([torch.arange(16) < n for n in COUNTS[b]])
            torch.testing.assert_close(got[b, head][:, real], wanted[:, real], atol=2e-5, rtol=1e-4)
            assert (got[b, head][:, ~real] == -torch.inf).all()


def test_scores_rank_tokens_much_like_true_logits(stored):
    fmt, index, payload, constants, keys = stored
    query = gaussian(1, 2, 8, 64, seed=9)
    table = torch.arange(5, dtype=torch.int32)[None]
    counts = torch.full((1, 5), 16, dtype=torch.int32)
    got = ops.score(query, index, table, counts, constants, 1.0, fmt.name).flatten(0, 1)
    decoded, _ = decode(fmt, index, payload, constants)
    for known in (keys, decoded):
        truth = (query[0][:, :, None] * known.transpose(0, 1).flatten(1, 2)[:, None]).sum(-1)
        both = torch.stack([x - x.mean(-1, keepdim=True) for x in (got, truth)])
        correlation = (both[0] * both[1]).sum(-1) / both.square().sum(-1).prod(0).sqrt()
        assert correlation.min() > 0.6


def test_rows_of_the_paper_preset_have_their_own_statistics():
    fmt = page_format("paper")
    keys = gaussian(1, 2, 16, 64)
    index, _, constants = encode(fmt, keys, keys)
    query = gaussian(1, 2, 1, 64).expand(2, -1, -1, -1).contiguous()
    table = torch.zeros(2, 1, dtype=torch.int32)
    counts = torch.full((2, 1), 16, dtype=torch.int32)
    rows = torch.cat((constants, 2 * constants))
    got = ops.score(query, index, table, counts, rows, 1.0, fmt.name)
    torch.testing.assert_close(got[1], 2 * got[0], atol=1e-4, rtol=1e-4)
