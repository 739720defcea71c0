"""`sparse_decode` on a GPU: score + select, attention, its merge; three launches.

Nothing is read back: lengths, budgets and selections stay on the device, so that a call can be
captured in a CUDA graph. The shapes of its launches depend on the block table's width and on
`width` only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...codec import PageFormat
from .launch import Kernel, KernelsUnavailable
from .loader import INPUT_TYPES, load, module_for

HEAD_DIMS, PAGE_SIZE, MAX_GROUPS = (64, 96, 128, 256), 128, 16
MOST_QUERIES = 8
"""New tokens a row that select for themselves; the reference operator serves more."""
STAGES, SELECT_BYTES = 2, 9 * 1024
"""As in the kernels' ring.cuh and select.cuh."""
WARPS, CLUSTERS = (8, 16), range(1, 17)
"""Warps of a block and blocks of a row that the score + select kernel may be launched with."""
ATTEND_THREADS = 256
"""Of a block of the attention kernel."""
MERGE_THREADS = 256
"""As in merge.cuh."""
RESERVED = 6 * 1024
"""Bytes of shared memory a block uses beside its dynamic shared memory, at most."""
MOST_BLOCKS = 1 << 24
"""A block number and a page's count share 32 bits in the score kernel."""
MOST_STRIDE = 1 << 32
"""Bytes from one page to the next are an unsigned 32-bit number there."""
LOG2_E = 1.4426950408889634


class Params(ctypes.Structure):
    """`struct Params` of common.cuh."""

    _pointer, _long, _int = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
    _fields_ = (
        ("query", _pointer),
        ("query_row", _long),
        ("query_head", _long),
        ("constants", _pointer),
        ("constants_row", _long),
        ("index", _pointer),
        ("index_stride", _long),
        ("payload", _pointer),
        ("payload_stride", _long),
        *((name, ctypes.c_void_p) for name in ("table", "counts", "budgets", "scratch", "take", "qfrag")),
        *((name, ctypes.c_void_p) for name in ("qstep", "offsets", "selected")),
        *((name, ctypes.c_void_p) for name in ("parts", "out", "lse")),
        *((name, ctypes.c_int) for name in ("heads", "pages", "width", "splits", "cluster", "cta_pages")),
        *((name, ctypes.c_int) for name in ("resident", "ring_keys")),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True)
class Plan:
    """How rows are spread over the GPU by the score + select kernel.

    Attributes:
        cluster: blocks a row; warps: warps a block; pages: pages a block, at most.
        shared: bytes of dynamic shared memory of a block.
        resident: pages of a block whose score codes lie in shared memory.
        ring_keys: selection keys of its other pages lie in shared memory too.
        scratch: bytes of device memory a block needs for the other pages' codes.
    """

    cluster: int
    warps: int
    pages: int
    shared: int
    resident: int
    ring_keys: bool
    scratch: int


BLOCK_COST, WARP_COST, PAGE_COST, BYTES_PER_US = 8.0, 0.1, 1.7, 2.4e6
CLUSTER_COST, CLUSTER_BLOCK_COST, CROWD_COST = 2.0, 0.15, 6.0
"""Rough microseconds of a block, each of its warps and a warp's further pages, memory bandwidth, and
microseconds of a cluster, each of its blocks, and of sharing a multiprocessor, on an H100."""


def chunk_bytes(fmt: PageFormat, groups: int) -> int:
    """Bytes of a page's score codes: 8 bits a query head and maxima, or 16 bits for the group."""
    return 2 * PAGE_SIZE if fmt.preset == "paper" else 528 * -(-groups // 4)


def selection_bytes(fmt: PageFormat) -> int:
    """Shared memory that the selection needs beside the records: keys are counted while pages are scored."""
    return SELECT_BYTES if fmt.preset == "paper" else 0


def attend_tokens(fmt: PageFormat) -> int:
    """Selected tokens that a block of the attention kernel takes."""
    return 128 if fmt.preset == "paper" and fmt.head_dim == 256 else 256


def layout(cluster: int, warps: int, pages: int, record: int, chunk: int, beside: int, room: int) -> Plan:
    """A plan whose blocks keep as many score codes in `room` bytes of shared memory as fit."""
    share = -(-pages // cluster)
    ring = warps * STAGES * (-(-(record + 16) // 128) * 128) + beside
    resident = max(0, min(share, (room - ring) // chunk))
    rest = share - resident
    ring_keys = rest * 2 * PAGE_SIZE <= ring - SELECT_BYTES
    return Plan(cluster, warps, share, ring + resident * chunk, resident, ring_keys, rest * chunk)


def plan(
    rows: int,
    pages: int,
    record: int,
    chunk: int,
    beside: int,
    limits: dict[int, int],
    clusters: bool,
    sms: int,
    at_once: Callable[[int, int, int], int],
) -> Plan:
    """Choose the plan that a rough model of its time favours.

    Args:
        rows: (sequence, KV head) pairs; pages: most pages of a row.
        record: bytes of a head's index record; chunk: bytes of a page's score codes.
        beside: bytes of shared memory for the selection, where it cannot lie where records were.
        limits: dynamic shared memory of a block, by warps.
        clusters: whether the device has thread block clusters; sms: its multiprocessors.
        at_once: (warps, cluster, shared bytes) -> rows that fit on the device together.

    Raises:
        KernelsUnavailable: none fits.
    """
    found: list[tuple[float, int, Plan]] = []
    for cluster in CLUSTERS if clusters else (1,):
        if cluster > 1 and cluster * 4 > pages:
            continue
        for warps, limit in limits.items():
            for blocks in (1, 2, 3):  # on a multiprocessor: each leaves the others their shared memory
                room = (limit - RESERVED * (blocks - 1)) // blocks
                choice = layout(cluster, warps, pages, record, chunk, beside, room)
                together = min(rows, at_once(warps, cluster, choice.shared)) if choice.shared <= limit else 0
                if together:
                    reading = together * pages * record / BYTES_PER_US
                    working = (-(-choice.pages // warps) - 1) * PAGE_COST
                    fixed = BLOCK_COST + WARP_COST * warps
                    if choice.scratch:
                        fixed += 2.0 if choice.ring_keys else 10.0
                    if cluster > 1:
                        fixed += CLUSTER_COST + CLUSTER_BLOCK_COST * cluster
                    if together * cluster > sms:
                        fixed += CROWD_COST
                    cost = -(-rows // together) * (fixed + max(reading, working))
                    found.append((cost, len(found), choice))
    if not found:
        raise KernelsUnavailable("no launch of the decode kernel fits the device")
    return min(found)[2]


def addressable(index_pool: Tensor, payload_pool: Tensor, fmt: PageFormat) -> bool:
    """Whether the kernels can read and write pages of these pools: they begin at multiples of 16 bytes."""
    return all(
        pool.shape[1] == size
        and pool.shape[0] <= MOST_BLOCKS
        and pool.stride(1) == 1
        and pool.stride(0) % 16 == 0
        and pool.stride(0) < MOST_STRIDE
        and pool.data_ptr() % 16 == 0
        for pool, size in ((index_pool, fmt.index_bytes), (payload_pool, fmt.payload_bytes))
    )


def supported(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    width: int,
    fmt: PageFormat,
) -> bool:
    """Whether the kernels serve this call; the reference operator serves the others."""
    return (
        fmt.page_size == PAGE_SIZE
        and fmt.head_dim in HEAD_DIMS
        and query.shape[2] <= MOST_QUERIES
        and query.shape[1] // fmt.kv_heads <= MAX_GROUPS
        and query.dtype in INPUT_TYPES
        and query.stride(3) == 1
        and addressable(index_pool, payload_pool, fmt)
        and width > 0
        and min(block_table.shape) > 0
    )


def sparse_decode(
    query: Tensor,
    index_pool: Tensor,
    payload_pool: Tensor,
    block_table: Tensor,
    page_counts: Tensor,
    budgets: Tensor,
    width: int,
    constants: Tensor,
    scaling: float,
    format: str,
) -> tuple[Tensor, Tensor]:
    """The operator `selfindex::sparse_decode` for a `supported` call.

    Raises:
        KernelsUnavailable: cuda-core is missing, or the GPU is too old.
    """
    return Decode(
        query,
        index_pool,
        payload_pool,
        block_table,
        page_counts,
        budgets,
        width,
        constants,
        scaling,
        format,
    ).run()


@lru_cache(maxsize=1024)
def _plan_for(
    decoders: tuple[tuple[int, Kernel], ...],
    rows: int,
    pages: int,
    record: int,
    chunk: int,
    beside: int,
    clusters: bool,
    sms: int,
) -> Plan:
    """`plan` for loaded kernels by warps, remembered: layers and steps ask for the same ones."""
    known = dict(decoders)
    limits = {warps: kernel.room for warps, kernel in known.items()}

    def at_once(warps: int, cluster: int, shared: int) -> int:
        return known[warps].at_once(32 * warps, cluster, shared, sms)

    return plan(rows, pages, record, chunk, beside, limits, clusters, sms, at_once)


class Decode:
    """One prepared call: its tensors, workspace and launches. `sparse_decode` runs it once."""

    def __init__(
        self,
        query: Tensor,
        index_pool: Tensor,
        payload_pool: Tensor,
        block_table: Tensor,
        page_counts: Tensor,
        budgets: Tensor,
        width: int,
        constants: Tensor,
        scaling: float,
        format: str,
    ) -> None:
        fmt, device = PageFormat.parse(format), query.device
        batch, query_heads, _, dim = query.shape
        heads, pages = fmt.kv_heads, block_table.shape[1]
        groups, rows = query_heads // heads, batch * heads
        self.kernels: dict[str, Kernel] = load(
            module_for("decode", fmt), device, dim, groups, fmt.value_bits, query.dtype
        )
        properties = torch.cuda.get_device_properties(device)
        self.modern = properties.major >= 9
        self.attend_threads = min(attend_tokens(fmt), ATTEND_THREADS)
        splits = -(-width // attend_tokens(fmt))
        sizes = {
            "take": 4 * rows,
            "selected": rows * width * 4,
            "parts": rows * splits * groups * (dim + 4) * 4,
            "offsets": 4 * rows * (groups if fmt.preset == "paper" else pages * 4 * (-(-groups // 4) + 1)),
        }
        if fmt.preset == "balanced":
            query_bytes = rows * groups * 2 * 4 * (128 if dim == 96 else dim)
            sizes |= {"qfrag": query_bytes, "qstep": rows * groups * 4}
        decoders = tuple((n, self.kernels[f"decode{n}"]) for n in WARPS if f"decode{n}" in self.kernels)
        page = fmt.index.record, chunk_bytes(fmt, groups), selection_bytes(fmt)
        sms = properties.multi_processor_count
        self.plan = _plan_for(decoders, rows, pages, *page, self.modern, sms)
        sizes["scratch"] = self.plan.scratch * rows * self.plan.cluster
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += -(-size // 256) * 256
        self.workspace = torch.empty(total, dtype=torch.uint8, device=device)
        self.output = query.new_empty(query.shape, dtype=torch.float32)
        self.lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        # Kept alive here: the launches hold addresses only.
        self.inputs = (
            query,
            constants.contiguous(),
            index_pool,
            payload_pool,
            block_table.int().contiguous(),
            page_counts.int().contiguous(),
            budgets.to(device, torch.int32).contiguous(),
        )
        _, shared, index, payload, table, counts, wanted = self.inputs
        self.params = Params(
            query=query.data_ptr(),
            query_row=query.stride(0),
            query_head=query.stride(1),
            constants=shared.data_ptr(),
            constants_row=shared.stride(0) if shared.shape[0] > 1 else 0,
            index=index.data_ptr(),
            index_stride=index.stride(0),
            payload=payload.data_ptr(),
            payload_stride=payload.stride(0),
            table=table.data_ptr(),
            counts=counts.data_ptr(),
            budgets=wanted.data_ptr(),
            out=self.output.data_ptr(),
            lse=self.lse.data_ptr(),
            heads=heads,
            pages=pages,
            width=width,
            splits=splits,
            cluster=self.plan.cluster,
            cta_pages=self.plan.pages,
            resident=self.plan.resident,
            ring_keys=self.plan.ring_keys,
            scale=scaling * LOG2_E,
            **{name: self.workspace.data_ptr() + start for name, start in starts.items() if sizes[name]},
        )
        self.rows, self.splits, self.groups = rows, splits, groups
        self._selected = starts["selected"], (batch, heads, 1, width)

    @property
    def selected(self) -> Tensor:
        """Slots the last run selected, int32 [B, H, 1, width]; undefined past a row's budget."""
        start, shape = self._selected
        end = start + 4 * self.rows * self.params.width
        return self.workspace[start:end].view(torch.int32).view(shape)

    def run(self, stages: tuple[str, ...] = ("decode", "attend")) -> tuple[Tensor, Tensor]:
        """Launch the kernels; `stages` leaves some out, for timing them one by one."""
        plan = self.plan
        with torch.cuda.device(self.output.device):
            if "decode" in stages:
                self.kernels[f"decode{plan.warps}"](
                    (self.rows * plan.cluster, 1),
                    32 * plan.warps,
                    [self.params],
                    plan.shared,
                    plan.cluster,
                    overlap=self.modern,
                )
            if "attend" in stages:
                # Starting early, it gets the cache that the first kernel left beside its shared memory:
                # too little for its gathers where codes fill that.
                overlap = self.modern and not plan.scratch
                self.kernels["attend"](
                    (self.splits, self.rows), self.attend_threads, [self.params], overlap=overlap
                )
                self._merge()
        return self.output, self.lse

    def _merge(self) -> None:
        """Launch the last part of the attention."""
        self.kernels["merge"]((self.groups, self.rows), MERGE_THREADS, [self.params], overlap=self.modern)


def select_keys(keys: Tensor, budgets: Tensor, width: int, cluster: int, preset: str = "balanced") -> Tensor:
    """Run the selection alone on given keys, for tests.

    Args:
        keys: int16 [rows, n], 0 (no token) to 2047, or 0 and 16 to 32767 (paper); n a multiple of 128.
        budgets: int32 [rows]; cluster: blocks a row.
    Returns:
        int32 [rows, width], undefined past a row's budget.
    """
    module = module_for("decode", PageFormat(preset, 1, 128, PAGE_SIZE))
    kernels = load(module, keys.device, 128, 4, 2, torch.bfloat16)
    keys = keys.clone()  # the kernel overwrites them
    selected = torch.full((keys.shape[0], width), -1, dtype=torch.int32, device=keys.device)
    values: list[Any] = [
        ctypes.c_void_p(keys.data_ptr()),
        ctypes.c_int(keys.shape[1]),
        ctypes.c_void_p(budgets.data_ptr()),
        ctypes.c_int(width),
        ctypes.c_int(cluster),
        ctypes.c_void_p(selected.data_ptr()),
    ]
    kernels["select_test"]((keys.shape[0] * cluster, 1), 256, values, 24 * 1024, cluster)
    return selected
