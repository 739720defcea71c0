"""Rows of bytes in host memory that a GPU reads and writes where they are."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, HostMemoryError

_MAP_NORESERVE = 0x4000
"""Of Linux; the mmap module names it from Python 3.13 on."""

MOST_BYTES = 64 << 30
"""Addresses reserved at most: a process has 128 TiB of them for all layers of all caches."""


class HostRows:
    """Rows that stay at one address while they grow, pinned and mapped for a GPU.

    A range of addresses is reserved once, for more than a layer will ever hold; it takes no memory.
    Growing pins what follows the rows there are: nothing is copied, and a captured CUDA graph
    stays valid. PyTorch's own pinned tensors could not grow in place, and are rounded up to a
    power of two.

    Args:
        row_bytes: size of a row, a multiple of 256.
        device: who works on the rows: a CUDA device, or the CPU, for which nothing is pinned.

    Attributes:
        data: uint8 [capacity, row_bytes], a tensor of `device` over the host memory.
        host: the same memory as a CPU tensor; `synchronize` before looking at it.

    Raises:
        ConfigError: the device or the operating system cannot do this.
        HostMemoryError: the addresses cannot be reserved.
    """

    def __init__(self, row_bytes: int, device: torch.device) -> None:
        if device.type not in ("cuda", "cpu"):
            raise ConfigError(f"offloading needs a CUDA device or the CPU, not {device.type}")
        if sys.platform != "linux":
            raise ConfigError(f"offloading needs Linux, this is {sys.platform}; leave it off")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.row_bytes, self._device = row_bytes, device
        # Regions are pinned in whole pages of the operating system, so they end at such rows.
        self._unit = math.lcm(row_bytes, mmap.PAGESIZE) // row_bytes
        self._range = _Range(device)
        self.host = torch.empty(0, row_bytes, dtype=torch.uint8, device="cpu")
        self.data = self.host.to(device)

    @property
    def capacity(self) -> int:
        return self.host.shape[0]

    def grow(self, rows: int) -> None:
        """Have room for `rows` rows at least.

        Raises:
            HostMemoryError: there is not enough host memory, or it cannot be pinned. Nothing changes.
        """
        if rows <= self.capacity:
            return
        capacity = -(-rows // self._unit) * self._unit
        self._range.use(capacity * self.row_bytes)
        host = self._range.tensor(capacity * self.row_bytes).view(capacity, self.row_bytes)
        data = self._range.device_tensor(capacity, self.row_bytes) if self._device.type == "cuda" else host
        self.host, self.data = host, data

    def runs(self, rows: list[int]) -> Iterator[tuple[int, int, int]]:
        """Split rows into (place in `rows`, first row, number) that one copy can serve.

        A copy may not cross the border of two pinned regions.
        """
        start, borders = 0, {start // self.row_bytes for start, _ in self._range.regions}
        for i in range(1, len(rows) + 1):
            if i == len(rows) or rows[i] != rows[i - 1] + 1 or rows[i] in borders:
                yield start, rows[start], i - start
                start = i

    def write(self, rows: list[int], content: Tensor) -> None:
        """Store uint8 [n, row_bytes], of any device; in order with the work of the current stream."""
        if content.device != self._device:
            # The host does not wait for the GPU by itself, which may still read what was there.
            self.synchronize()
        for place, first, count in self.runs(rows):
            self.host[first : first + count].copy_(content[place : place + count], non_blocking=True)

    def read(self, rows: list[int], device: torch.device) -> Tensor:
        """A copy of rows, uint8 [n, row_bytes] on `device`; in order with the current stream."""
        if device != self._device:
            self.synchronize()
        content = torch.empty(len(rows), self.row_bytes, dtype=torch.uint8, device=device)
        for place, first, count in self.runs(rows):
            content[place : place + count].copy_(self.host[first : first + count], non_blocking=True)
        return content

    def synchronize(self) -> None:
        """Wait until the device has finished with the rows."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Range:
    """Reserved addresses, and which of them are in use. It lives as long as the last tensor on it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._size = min(MOST_BYTES, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE)
        try:
            self._memory = mmap.mmap(
                -1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            )
        except OSError as error:
            raise HostMemoryError(
                f"cannot reserve {self._size >> 30} GiB of addresses for offloading: {error}; see ulimit -v "
                "and vm.overcommit_memory"
            ) from error
        with suppress(OSError):  # kernels built without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.regions: list[tuple[int, int]] = []
        """First and last byte of what was taken into use, and for a GPU pinned, together."""
        if device.type == "cuda":
            # A child process would make copies on write, of which the GPU knows nothing.
            self._memory.madvise(mmap.MADV_DONTFORK)
            # At exit the driver cleans up, and may be gone before us.
            weakref.finalize(self, _unpin, self._memory, self.address, self.regions, device).atexit = False

    def use(self, end: int) -> None:
        """Take everything up to byte `end` into use."""
        start, free = self.regions[-1][1] if self.regions else 0, available()
        if end <= start:
            return
        if end > self._size:
            raise HostMemoryError(f"a layer's offloaded payload may take {self._size >> 30} GiB, no more")
        if end - start > free:
            raise HostMemoryError(
                f"offloading needs {(end - start) / 2**20:.0f} MiB more host memory, "
                f"{free / 2**20:.0f} MiB are available"
            )
        # Touching the pages with all threads is faster than leaving it to the pinning.
        self.tensor(end)[start:].zero_()
        if self._device.type == "cuda":
            self._pin(start, end)
        self.regions.append((start, end))

    def _pin(self, start: int, end: int) -> None:
        # Threads may share the list, and what is still in the way comes back to it.
        for _ in range(len(_late)):
            with suppress(IndexError):
                _unpin(*_late.popleft())
        with torch.cuda.device(self._device):
            try:
                status = torch.cuda.cudart().cudaHostRegister(self.address + start, end - start, 0)
            except BaseException:
                # Ctrl-C during the call is raised after it: nobody would ever unpin this region.
                torch.cuda.cudart().cudaHostUnregister(self.address + start)
                raise
        if int(status) != 0:
            with suppress(RuntimeError):
                # CUDA reports a failed call once more, at the next launch: have it here.
                torch.zeros(1, device=self._device)
            self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)
            raise HostMemoryError(
                f"CUDA cannot pin {(end - start) / 2**20:.0f} MiB of host memory for offloading "
                f"(error {int(status)})"
            )

    def tensor(self, size: int) -> Tensor:
        """The first `size` bytes as a CPU tensor."""
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=size)

    def device_tensor(self, rows: int, row_bytes: int) -> Tensor:
        """The first rows as a CUDA tensor: with unified addressing, the addresses are the same."""
        tensor = torch.as_tensor(_DeviceView(self, rows, row_bytes), device=self._device)
        if tensor.data_ptr() != self.address:
            raise ConfigError("offloading needs a GPU that addresses host memory as the host does")
        return tensor


class _DeviceView:
    """Tells PyTorch where the bytes are; tensors made from it keep it, and the range, alive."""

    def __init__(self, owner: _Range, rows: int, row_bytes: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (rows, row_bytes),
            "typestr": "|u1",
            "data": (owner.address, False),
            "strides": None,
            "version": 2,
        }


_late: deque[tuple[mmap.mmap, int, list[tuple[int, int]], torch.device]] = deque()
"""What could not be unpinned yet: CUDA allows no such call while a graph is captured."""


def _unpin(memory: mmap.mmap, address: int, regions: list[tuple[int, int]], device: torch.device) -> None:
    """Let go of the pinned regions of `memory`, which has to exist until then."""
    if torch.cuda.is_current_stream_capturing():
        _late.append((memory, address, regions, device))
        return
    try:
        if regions:
            torch.cuda.synchronize(device)
        while regions:
            torch.cuda.cudart().cudaHostUnregister(address + regions[-1][0])
            regions.pop()
    except BaseException:
        # Another thread captures a graph, or Ctrl-C: the memory stays, and the next pinning has a try.
        _late.append((memory, address, regions, device))
        raise


def available() -> int:
    """Bytes of host memory that can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else sys.maxsize
