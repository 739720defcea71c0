"""Launching loaded kernels on PyTorch's current stream through the CUDA driver."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from ...errors import DeviceError

OUT_OF_MEMORY = 2
LOST = {
    *(3, 4, 201, 214, 220, 226, 700, 702, 709, 710),
    *(714, 715, 716, 717, 718, 719, 721, 999),
}
"""Status codes after which the driver runs nothing more in this process (cuda.h, CUresult)."""
CAPTURING = range(900, 909)
"""Status codes of a graph that is captured: no other operator may run in its place."""

DEFAULT_SHARED = 48 * 1024
"""Dynamic shared memory a kernel gets without asking."""


class KernelsUnavailable(Exception):
    """The kernels cannot run here; the message says why and what to do about it."""


class Kernel:
    """One kernel of a loaded module.

    Attributes:
        room: dynamic shared memory a block may have.
    """

    def __init__(self, handle: Any, driver: Any, largest: int, clusters: bool) -> None:
        self._handle, self._driver = handle, driver
        attribute = driver.CUfunction_attribute
        self.room = DEFAULT_SHARED
        if largest > DEFAULT_SHARED:
            static = _check(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle))
            self.room = largest - static
            name = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(handle, name, self.room))
        if clusters:
            name = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _check(driver.cuFuncSetAttribute(handle, name, 1))

    def at_once(self, threads: int, cluster: int, shared: int, sms: int) -> int:
        """Clusters (blocks, for a cluster of 1) of a launch that fit on the device together."""
        driver = self._driver
        if cluster == 1:
            blocks = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._handle, threads, shared)
            return int(_check(blocks)) * sms
        config = _config((cluster, 1), threads, shared, cluster, False, 0)
        return int(_check(driver.cuOccupancyMaxActiveClusters(self._handle, config)))

    def __call__(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: list[Any],
        shared: int = 0,
        cluster: int = 1,
        overlap: bool = False,
    ) -> None:
        """Launch.

        Args:
            arguments: ctypes values, one per kernel parameter.
            shared: bytes of dynamic shared memory.
            cluster: blocks of a cluster along the grid's first dimension.
            overlap: may start before the previous kernel ends; the kernel itself waits for it.
        """
        stream = torch.cuda.current_stream().cuda_stream
        config = _config(grid, threads, shared, cluster, overlap, stream)
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        _check(self._driver.cuLaunchKernelEx(config, self._handle, ctypes.addressof(pointers), 0))


@lru_cache(maxsize=4096)
def _config(
    grid: tuple[int, int], threads: int, shared: int, cluster: int, overlap: bool, stream: int
) -> Any:
    """A launch's shape, not to be changed: every step of a model launches the same ones again."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    attributes = []
    if cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x = cluster
        attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
        attributes.append(attribute)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def open_module(code: bytes, device: int) -> dict[str, Kernel]:
    """Load a cubin into the context of a device and return its kernels by name.

    Raises:
        KernelsUnavailable: the driver does not take it, or cannot be called.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelsUnavailable(f"cuda-bindings cannot be imported ({error})") from error

    with torch.cuda.device(device):
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        limit = _check(driver.cuDeviceGetAttribute(attribute, device))
        clusters = torch.cuda.get_device_capability(device)[0] >= 9
        module = _check(driver.cuModuleLoadData(code))
        kernels = {}
        count = _check(driver.cuModuleGetFunctionCount(module))
        for handle in _check(driver.cuModuleEnumerateFunctions(count, module)):
            name = _check(driver.cuFuncGetName(handle)).decode()
            wide = name.startswith(("decode", "select", "window"))
            kernels[name] = Kernel(handle, driver, limit if wide else 0, clusters and wide)
    return kernels


def _check(result: tuple[Any, ...]) -> Any:
    """Unpack (status, value) of a driver call.

    Raises:
        KernelsUnavailable: the driver refuses the call; nothing has run, and other operators can.
        torch.OutOfMemoryError: there is not enough GPU memory for it.
        DeviceError: the GPU has failed, in this call or in work launched before it, or captures a graph.
    """
    status, *values = result
    code = int(status)
    if code == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory: no room to load or launch a kernel ({status.name})"
        )
    if code in LOST:
        raise DeviceError(
            f"the GPU reports {status.name}, from this call or from work launched before it; start the "
            "process again (CUDA_LAUNCH_BLOCKING=1 shows where it comes from)"
        )
    if code in CAPTURING:
        raise DeviceError(f"a call came that the CUDA graph being captured cannot hold ({status.name})")
    if code != 0:
        raise KernelsUnavailable(f"the CUDA driver refuses a kernel: {status.name}")
    return values[0] if values else None
