import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import HEAD_DIMS

from selfindex.codec import FORMAT_VERSION, PageFormat, codec_for
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
    fmt = PageFormat("balanced", 8, 128, 256, 3)
    assert fmt.name == f"balanced-{FORMAT_VERSION}:h8,d128,p256,v3"


@pytest.mark.parametrize("name", ["", "balanced", "balanced-1:h8,d128,p256", "other-1:h8,d128,p256,v2"])
def test_what_is_not_a_name_is_refused(name):
    with pytest.raises(FormatError, match="not a page format"):
        PageFormat.parse(name)
    with pytest.raises(FormatError, match="not a page format"):
        codec_for(name)


def test_another_version_is_refused():
    with pytest.raises(FormatError, match="version 99"):
        PageFormat.parse("balanced-99:h8,d128,p256,v2")


def test_unsupported_head_dim_is_refused():
    with pytest.raises(FormatError, match="head_dim 48"):
        PageFormat.parse(f"balanced-{FORMAT_VERSION}:h8,d48,p256,v2")


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
