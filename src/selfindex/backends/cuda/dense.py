"""`dense_attend` on a GPU: attention to every encoded token, decoded on the fly.

Nothing is read back: lengths stay on the device, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ...codec import PageFormat
from .decode import HEAD_DIMS, LOG2_E, PAGE_SIZE, addressable
from .launch import Kernel
from .loader import INPUT_TYPES, load, module_for

NARROW_ROWS = 16
"""Query rows of a tile whose warps share the tokens of a page."""
MOST_NARROW_TILES = 3
"""Tiles up to which narrow ones are faster than a wide one that is mostly empty."""


class DenseParams(ctypes.Structure):
    """`struct DenseParams` of dense.cuh."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        *((f"query_{what}", ctypes.c_longlong) for what in ("row", "head", "token")),
        ("constants", ctypes.c_void_p),
        ("constants_row", ctypes.c_longlong),
        ("index", ctypes.c_void_p),
        ("index_stride", ctypes.c_longlong),
        ("payload", ctypes.c_void_p),
        ("payload_stride", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("table", "counts", "parts", "out", "lse")),
        *((name, ctypes.c_int) for name in ("heads", "groups", "queries", "pages", "splits")),
        ("scale", ctypes.c_float),
    )


def supported(
    query: Tensor, index_pool: Tensor, payload_pool: Tensor, block_table: Tensor, fmt: PageFormat
) -> bool:
    """Whether the kernels serve this call; the reference operator serves the others."""
    return (
        fmt.page_size == PAGE_SIZE
        and fmt.head_dim in HEAD_DIMS
        and query.dtype in INPUT_TYPES
        and query.stride(3) == 1
        and addressable(index_pool, payload_pool, fmt)
        and query.numel() > 0
        and block_table.shape[1] > 0
        and query.shape[0] * fmt.kv_heads < 1 << 16  # a grid's second dimension
    )


@dataclass(frozen=True)
class Shape:
    """What a kernel is launched with.

    Attributes:
        kernel: its name; rows: query rows of a tile.
        threads: threads a block; shared: bytes of dynamic shared memory of a block.
    """

    kernel: str
    rows: int
    threads: int
    shared: int


@lru_cache(maxsize=1024)
def shape_for(query_rows: int, fmt: PageFormat, wgmma: bool) -> Shape:
    """Choose the kernel for `query_rows` rows of a KV head; `wgmma`: Hopper's kernel may be used."""
    dim, page = fmt.head_dim, fmt.index.record + fmt.payload.record
    sums = 4 * 16 * (dim + 4)  # a warp's 16 rows on their way out
    if wgmma and query_rows > MOST_NARROW_TILES * NARROW_ROWS:
        decoded = 2 * 2 * dim * (2 * PAGE_SIZE + 8)  # two pages
        shared = 1024 + 2 * 128 * dim + max(decoded, 8 * sums) + 2 * page
        return Shape("decode_all_wgmma", 128, 512, shared)
    staged = 2 * page + 2 * 4 * PAGE_SIZE
    if fmt.preset == "paper":  # tables of levels and lines of values, for 32 channels each
        staged += 12 * PAGE_SIZE * (dim // 32)
    narrow = query_rows <= MOST_NARROW_TILES * NARROW_ROWS
    rows = NARROW_ROWS if narrow else 64 if dim == 256 else 128
    name = "decode_all_narrow" if narrow else "decode_all_wide"
    return Shape(name, rows, 128, max(2 * rows * dim + staged, 4 * sums))


MERGE_COST = 0.25
"""Time of writing and merging a block's part, in pages."""
MOST_SCRATCH = 256 << 20
"""Bytes of the parts that blocks leave for each other."""


@lru_cache(maxsize=4096)
def splits_for(tiles: int, pages: int, at_once: int, most: int) -> int:
    """Blocks that share the pages of a tile.

    Args:
        tiles: tiles of all rows and KV heads; pages: most pages of a row.
        at_once: blocks that fit on the device together.
        most: blocks whose parts there is room for.
    """

    def cost(splits: int) -> float:
        waves = -(-tiles * splits // at_once)
        return waves * (-(-pages // splits) + MERGE_COST * (splits > 1)) + splits * MERGE_COST / 16

    candidates = {1, min(pages, max(1, most))} | {waves * at_once // tiles for waves in (1, 2, 3, 4)}
    return min((n for n in sorted(candidates) if n == 1 or 1 < n <= min(pages, most)), key=cost)


def dense_attend(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::dense_attend` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    fmt, device = PageFormat.parse(format), query.device
    batch, query_heads, queries, dim = query.shape
    heads, pages = fmt.kv_heads, block_table.shape[1]
    groups = query_heads // heads
    kernels = load(module_for("dense", fmt), device, dim, 1, fmt.value_bits, query.dtype)
    shape = shape_for(groups * queries, fmt, "decode_all_wgmma" in kernels and scaling > 0)
    kernel, tiles = kernels[shape.kernel], -(-groups * queries // shape.rows)
    part = batch * query_heads * queries, dim + 4
    most = MOST_SCRATCH // (4 * part[0] * part[1])
    splits = splits_for(tiles * batch * heads, pages, _at_once(kernel, shape, device), most)
    parts = torch.empty(
        (splits * part[0], part[1]) if splits > 1 else (0,),
        dtype=torch.float32,
        device=device,
    )
    output = query.new_empty(query.shape, dtype=torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    constants = constants.contiguous()
    table, counts = block_table.int().contiguous(), page_counts.int().contiguous()
    params = DenseParams(
        query.data_ptr(),
        *query.stride()[:3],
        constants.data_ptr(),
        constants.stride(0) if constants.shape[0] > 1 else 0,
        index_pool.data_ptr(),
        index_pool.stride(0),
        payload_pool.data_ptr(),
        payload_pool.stride(0),
        *(x.data_ptr() for x in (table, counts, parts, output, lse)),
        heads,
        groups,
        queries,
        pages,
        splits,
        scaling * LOG2_E,
    )
    with torch.cuda.device(device):
        kernel((tiles * splits, batch * heads), shape.threads, [params], shape.shared)
        if splits > 1:
            overlap = torch.cuda.get_device_properties(device).major >= 9
            kernels["dense_merge"]((groups * queries, batch * heads), 128, [params], overlap=overlap)
    return output, lse


@lru_cache(maxsize=256)
def _at_once(kernel: Kernel, shape: Shape, device: torch.device) -> int:
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return kernel.at_once(shape.threads, 1, shape.shared, sms)
