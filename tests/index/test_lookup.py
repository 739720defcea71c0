import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import PRESETS, array, encode, gaussian, page_format

from selfindex.codec import codec_for, packing
from selfindex.index.lut import lookup, lookup_by_group


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 5),
    st.integers(0, 20),
    st.sampled_from([8, 16, 80]),
    st.integers(0, 2**31),
)
def test_lookup_equals_its_spelled_out_form(lead, queries, slots, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    lut = torch.randn(*lead, queries, dim // 4, 16, generator=generator)
    packed = torch.randint(0, 256, (*lead, slots, dim // 8), generator=generator, dtype=torch.uint8)
    got, wanted = lookup(lut, packed), lookup_by_group(lut, packed)
    assert got.shape == (*lead, queries, slots)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_balanced_table_sum_is_the_dot_product_with_the_signs():
    fmt = page_format(dim=80)
    codec = codec_for(fmt.name)
    query = gaussian(1, 2, 3, 80)
    packed = torch.randint(0, 256, (1, 2, 20, 10), dtype=torch.uint8)
    signs = packing.unpack_bits(packed).float() * 2 - 1
    got = lookup(codec.lut(query, torch.ones(1, 2, 80)), packed)
    torch.testing.assert_close(got, query @ signs.transpose(-1, -2), atol=1e-4, rtol=1e-5)


def test_paper_table_sum_is_the_dot_product_with_the_centroids():
    fmt = page_format("paper")
    keys = gaussian(1, 2, 16, 64)
    index, _, constants = encode(fmt, keys, keys)
    codec = codec_for(fmt.name)
    packed = array(fmt, index, "index", "codes")
    codebook = codec.split(constants)[2]  # [1, H, d / 4, 16, 4]
    codes = packing.group_codes(packed).long()  # [1, H, P, d / 4]
    query = gaussian(1, 2, 3, 64, seed=5)
    got = lookup(codec.lut(query, constants), packed)
    for head in range(2):
        for token in range(16):
            centroid = torch.cat([codebook[0, head, g, codes[0, head, token, g]] for g in range(16)])
            torch.testing.assert_close(
                got[0, head, :, token], query[0, head] @ centroid, atol=1e-4, rtol=1e-5
            )


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
def test_lut_keeps_the_query_dimensions(preset, bits):
    fmt = page_format(preset, bits)
    keys = gaussian(2, 2, 16, 64)
    _, _, constants = encode(fmt, keys, keys)
    codec = codec_for(fmt.name)
    query = gaussian(3, 2, 5, 7, 64)
    lut = codec.lut(codec.map_query(query, constants), constants)
    assert lut.shape == (3, 2, 5, 7, 16, 16)
    alone = codec.lut(codec.map_query(query[1:2, :, 4:5], constants), constants)
    torch.testing.assert_close(alone[0, :, 0], lut[1, :, 4])
