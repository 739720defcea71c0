import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import HEAD_DIMS

from selfindex.codec import FORMAT_VERSIONS, PageFormat, codec_for
from selfindex.errors import FormatError

formats = st.builds(
    PageFormat,
    preset=st.sampled_from(["balanced", "paper"]),
    kv_heads=st.integers(1, 64),
    head_dim=st.sampled_from(HEAD_DIMS),
    page_size=st.integers(1, 64).map(lambda n: 8 * n),
    value_bits=st.just(2),
)


@given(formats)
def test_name_round_trip(fmt):
    assert PageFormat.parse(fmt.name) == fmt


def test_name_is_pinned():
    assert PageFormat("balanced", 8, 128, 256, 3).name == "balanced-1:h8,d128,p256,v3"
    assert PageFormat("paper", 8, 128, 128).name == "paper-2:h8,d128,p128,v2"


@pytest.mark.parametrize("name", ["", "balanced", "balanced-1:h8,d128,p256", "other-1:h8,d128,p256,v2"])
def test_what_is_not_a_name_is_refused(name):
    with pytest.raises(FormatError, match="not a page format"):
        PageFormat.parse(name)
    with pytest.raises(FormatError, match="not a page format"):
        codec_for(name)


def test_another_version_is_refused():
    with pytest.raises(FormatError, match="version 99"):
        PageFormat.parse("balanced-99:h8,d128,p256,v2")
    with pytest.raises(FormatError, match="version 1 of 'paper' is not 2"):
        PageFormat.parse("paper-1:h8,d128,p128,v2")


def test_unsupported_head_dim_is_refused():
    with pytest.raises(FormatError, match="head_dim 48"):
        PageFormat.parse(f"balanced-{FORMAT_VERSIONS['balanced']}:h8,d48,p256,v2")


@given(formats, st.integers(1, 2))
def test_arrays_do_not_share_bytes(fmt, pages):
    for layout in (fmt.index, fmt.payload):
        data = torch.zeros(pages, layout.nbytes, dtype=torch.uint8)
        arrays = [fmt.view(data, layout, name) for name in layout.sections]
        if layout is fmt.index:
            arrays.append(fmt.count(data))
        for number, view in enumerate(arrays, 1):
            view.fill_(number)
        for number, view in enumerate(arrays, 1):
            assert view.shape[0] == pages
            assert (view == number).all()


def test_scales_and_zero_points_of_a_token_lie_side_by_side():
    fmt = PageFormat("paper", 2, 128, 128)
    names = ("key_scale", "key_zero", "value_scale", "value_zero")
    found = [fmt.payload.sections[name] for name in names]
    assert [section.offset for section in found] == [128 * 64 + 8 * i for i in range(4)]
    assert all(section.stride == 32 for section in found)
    page = torch.zeros(1, fmt.payload_bytes, dtype=torch.uint8)
    fmt.view(page, fmt.payload, "value_scale")[0, 1, 5] = torch.tensor([1.0, 2, 3, 4])
    at = fmt.payload.record + 128 * 64 + 5 * 32 + 16
    assert page[0, at : at + 8].view(torch.float16).tolist() == [1, 2, 3, 4]
    assert int(page.count_nonzero()) == 4
