"""Byte layout of an encoded page. docs/format.md describes the same in words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import FormatError
from .rotation import HEAD_DIMS

FORMAT_VERSIONS = {"balanced": 1, "paper": 2}
"""By preset."""
ALIGN_PLANE, ALIGN_RECORD = 256, 16
PAPER_GROUP = 32
"""Channels that share a scale and zero point in the paper preset."""

_NAME = re.compile(r"(balanced|paper)-(\d+):h(\d+),d(\d+),p(\d+),v(\d+)")


_Array = tuple[str, torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Section:
    """One array of a head's record in a plane.

    Attributes:
        offset: first byte within the record.
        stride: bytes from one token to the next, for arrays that are interleaved with others; `start` is
            the first byte within the record of what is interleaved.
        dtype, shape: element type, and shape within the record ([P, ...] or [...]).
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: int | None = None
    start: int = 0


@dataclass(frozen=True)
class Plane:
    """Layout of one plane of a page: a record per KV head, one after the other, then a trailer.

    Attributes:
        sections: arrays of a record by name.
        record: bytes per head, a multiple of 16.
        nbytes: size of the plane, a multiple of 256.
    """

    sections: dict[str, Section]
    record: int
    nbytes: int


@dataclass(frozen=True)
class PageFormat:
    """Describes the pages of one layer; also the `format` argument of every operator.

    Attributes:
        preset: "balanced" or "paper".
        kv_heads, head_dim, page_size: H, d and P below.
        value_bits: bits per value channel (balanced: 2 or 3; paper: 2).
    """

    preset: str
    kv_heads: int
    head_dim: int
    page_size: int
    value_bits: int = 2

    def __post_init__(self) -> None:
        if self.head_dim not in HEAD_DIMS:
            raise FormatError(f"head_dim {self.head_dim} is not supported; supported are {HEAD_DIMS}")

    @property
    def name(self) -> str:
        """Canonical text, for instance "balanced-1:h8,d128,p256,v2"."""
        return (
            f"{self.preset}-{FORMAT_VERSIONS[self.preset]}:h{self.kv_heads},d{self.head_dim},"
            f"p{self.page_size},v{self.value_bits}"
        )

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(name: str) -> PageFormat:
        """Inverse of `name`.

        Raises:
            FormatError: not a format name, or of a version this release does not know.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise FormatError(f"{name!r} is not a page format, such as 'balanced-1:h8,d128,p256,v2'")
        preset, version, *numbers = match.groups()
        if int(version) != FORMAT_VERSIONS[preset]:
            raise FormatError(
                f"page format version {version} of {preset!r} is not {FORMAT_VERSIONS[preset]}; "
                "read it with the release of selfindex that wrote it"
            )
        return PageFormat(preset, *map(int, numbers))

    @cached_property
    def index(self) -> Plane:
        """Layout of the index plane: what scoring reads."""
        p, d = self.page_size, self.head_dim
        arrays: list[_Array] = [("codes", torch.uint8, (p, d // 8))]
        if self.preset == "balanced":
            arrays += [
                ("key_scale", torch.uint8, (p,)),
                ("mean", torch.int8, (d,)),
                ("mean_step", torch.float32, ()),
                ("key_base", torch.float32, ()),
                ("value_base", torch.float32, ()),
            ]
        # The trailer is the count of valid tokens, an int32 after the last record.
        return _lay_out(self.kv_heads, [], p, arrays, trailer=4)

    @cached_property
    def payload(self) -> Plane:
        """Layout of the payload plane: what attention reads, beside the index, of a selected token."""
        p, d = self.page_size, self.head_dim
        u8, f16 = torch.uint8, torch.float16
        token: list[_Array] = [("magnitudes", u8, (d // 4,)), ("values", u8, (d // 4,))]
        if self.value_bits == 3:
            token += [("value_signs", u8, (d // 8,))]
        if self.preset == "balanced":
            return _lay_out(self.kv_heads, token, p, [("value_scale", u8, (p,))])
        groups = -(-d // PAPER_GROUP)
        names = ("key_scale", "key_zero", "value_scale", "value_zero")
        # Side by side: a token that is read costs the memory one access for all of them.
        return _lay_out(self.kv_heads, token, p, [], [(name, f16, (groups,)) for name in names])

    @property
    def index_bytes(self) -> int:
        """Size of a page's index plane, a multiple of 256."""
        return self.index.nbytes

    @property
    def payload_bytes(self) -> int:
        """Size of a page's payload plane, a multiple of 256."""
        return self.payload.nbytes

    @property
    def constants(self) -> int:
        """float32 numbers per head that pages share: balance, or the paper's prompt statistics."""
        # paper: mean [d], alpha [d], codebook [d / 4 groups, 16 codes, 4 channels]
        return self.head_dim if self.preset == "balanced" else 18 * self.head_dim

    def view(self, data: Tensor, plane: Plane, name: str) -> Tensor:
        """Typed view of one array in pages: uint8 [..., plane bytes] -> dtype [..., H, *shape]."""
        section = plane.sections[name]
        records = data[..., : self.kv_heads * plane.record].unflatten(-1, (self.kv_heads, plane.record))
        if section.stride is not None:
            tokens, first = section.shape[0], section.offset - section.start
            rows = records[..., section.start : section.start + tokens * section.stride]
            width = section.shape[1] * section.dtype.itemsize
            own = rows.unflatten(-1, (tokens, section.stride))[..., first : first + width]
            return own if section.dtype == torch.uint8 else own.view(section.dtype)
        size = math.prod(section.shape) * section.dtype.itemsize
        content = records[..., section.offset : section.offset + size]
        typed = content if section.dtype == torch.uint8 else content.view(section.dtype)
        return typed.squeeze(-1) if section.shape == () else typed.unflatten(-1, section.shape)

    def count(self, data: Tensor) -> Tensor:
        """View of the number of valid tokens: index planes uint8 [..., bytes] -> int32 [...]."""
        start = self.kv_heads * self.index.record
        return data[..., start : start + 4].view(torch.int32).squeeze(-1)


def _lay_out(
    heads: int,
    token: list[_Array],
    page_size: int,
    arrays: list[_Array],
    shared: list[_Array] | None = None,
    trailer: int = 0,
) -> Plane:
    """A record: what is interleaved token by token first, `token` and then `shared`, then whole arrays."""
    sections: dict[str, Section] = {}
    offset = 0
    for interleaved in (token, shared or []):
        start = offset
        stride = sum(shape[0] * dtype.itemsize for _, dtype, shape in interleaved)
        for name, dtype, shape in interleaved:
            sections[name] = Section(offset, dtype, (page_size, *shape), stride, start)
            offset += shape[0] * dtype.itemsize
        offset = start + stride * page_size
    for name, dtype, shape in arrays:
        offset = _align(offset, dtype.itemsize)
        sections[name] = Section(offset, dtype, shape)
        offset += math.prod(shape) * dtype.itemsize
    record = _align(offset, ALIGN_RECORD)
    return Plane(sections, record, _align(heads * record + trailer, ALIGN_PLANE))


def _align(size: int, unit: int) -> int:
    return -(-size // unit) * unit
