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

FORMAT_VERSION = 1
ALIGN_PLANE, ALIGN_SECTION = 256, 16
PAPER_GROUP = 32
"""Channels that share a scale and zero point in the paper preset."""

_NAME = re.compile(r"(balanced|paper)-(\d+):h(\d+),d(\d+),p(\d+),v(\d+)")


@dataclass(frozen=True)
class Section:
    """One array inside a plane: its byte offset, element type and shape per page."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
            f"{self.preset}-{FORMAT_VERSION}:h{self.kv_heads},d{self.head_dim},"
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
        if int(version) != FORMAT_VERSION:
            raise FormatError(
                f"page format version {version} is not {FORMAT_VERSION}; "
                "read it with the release of selfindex that wrote it"
            )
        return PageFormat(preset, *map(int, numbers))

    @cached_property
    def index(self) -> dict[str, Section]:
        """Sections of the index plane: what scoring reads."""
        h, p, d = self.kv_heads, self.page_size, self.head_dim
        arrays: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("codes", torch.uint8, (h, p, d // 8))]
        if self.preset == "balanced":
            arrays += [
                ("key_scale", torch.uint8, (h, p)),
                ("mean", torch.int8, (h, d)),
                ("mean_step", torch.float32, (h,)),
                ("key_base", torch.float32, (h,)),
            ]
        arrays += [("count", torch.int32, (1,))]
        return _lay_out(arrays)

    @cached_property
    def payload(self) -> dict[str, Section]:
        """Sections of the payload plane: what attention reads, beside the index, of a selected token."""
        h, p, d = self.kv_heads, self.page_size, self.head_dim
        u8, f16, f32 = torch.uint8, torch.float16, torch.float32
        arrays: list[tuple[str, torch.dtype, tuple[int, ...]]] = [("magnitudes", u8, (h, p, d // 4))]
        if self.preset == "balanced":
            if self.value_bits == 3:
                arrays += [("value_signs", u8, (h, p, d // 8))]
            arrays += [
                ("values", u8, (h, p, d // 4)),
                ("value_scale", u8, (h, p)),
                ("value_base", f32, (h,)),
            ]
        else:
            groups = -(-d // PAPER_GROUP)
            arrays += [
                ("key_scale", f16, (h, p, groups)),
                ("key_zero", f16, (h, p, groups)),
                ("values", u8, (h, p, d // 4)),
                ("value_scale", f16, (h, p, groups)),
                ("value_zero", f16, (h, p, groups)),
            ]
        return _lay_out(arrays)

    @cached_property
    def index_bytes(self) -> int:
        """Size of a page's index plane, a multiple of 256."""
        return _plane_bytes(self.index)

    @cached_property
    def payload_bytes(self) -> int:
        """Size of a page's payload plane, a multiple of 256."""
        return _plane_bytes(self.payload)

    @property
    def constants(self) -> int:
        """float32 numbers per head that pages share: balance, or the paper's prompt statistics."""
        # paper: mean [d], alpha [d], codebook [d / 4 groups, 16 codes, 4 channels]
        return self.head_dim if self.preset == "balanced" else 18 * self.head_dim

    def view(self, plane: Tensor, section: Section) -> Tensor:
        """Typed view of one section: uint8 [..., plane bytes] -> dtype [..., *section.shape]."""
        raw = plane[..., section.offset : section.offset + section.nbytes]
        typed = raw if section.dtype == torch.uint8 else raw.view(section.dtype)
        return typed.unflatten(-1, section.shape)


def _lay_out(arrays: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, Section]:
    sections, offset = {}, 0
    for name, dtype, shape in arrays:
        sections[name] = Section(offset, dtype, shape)
        end = offset + sections[name].nbytes
        offset = -(-end // ALIGN_SECTION) * ALIGN_SECTION
    return sections


def _plane_bytes(sections: dict[str, Section]) -> int:
    end = max(s.offset + s.nbytes for s in sections.values())
    return -(-end // ALIGN_PLANE) * ALIGN_PLANE
