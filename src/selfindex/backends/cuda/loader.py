"""Compiles kernels with NVRTC at first use and keeps the machine code on disk."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...codec import PageFormat
from ...codec.balanced import SIGN_GAIN
from ...codec.rotation import hadamard
from ...index.select import SHARPNESS
from .launch import Kernel, KernelsUnavailable, open_module

SOURCES = Path(__file__).with_name("kernels")
MODULES = {
    "decode": (
        *("common", "rotate", "count", "prepare", "cluster", "ring", "select", "score", "decode"),
        *("attend", "merge"),
    ),
    "paper_decode": (
        *("paper", "common", "rotate", "count", "prepare_paper", "cluster", "ring", "select"),
        *("score_paper", "decode", "attend_paper", "merge"),
    ),
    "offloaded": ("common", "rotate", "fetch", "attend"),
    "paper_offloaded": ("paper", "common", "rotate", "fetch", "attend_paper"),
    "encode": ("common", "rotate", "encode", "encode_balanced"),
    "paper_encode": ("paper", "common", "encode", "encode_paper"),
    "dense": ("common", "rotate", "places", "dense_rows", "dense", "dense_wgmma"),
    "paper_dense": ("paper", "common", "rotate", "places", "dense_rows", "dense", "dense_wgmma"),
    "pages": ("common", "rotate", "places", "pages", "pages_balanced"),
    "paper_pages": ("paper", "common", "places", "pages", "pages_paper"),
    "join": ("common", "join"),
    "statistics": ("common", "statistics"),
    "window": ("common", "window"),
    "balance": ("common", "balance"),
}
"""Source files of each module, in order: they are compiled as one text."""

INPUT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OLDEST = (8, 0)
"""Lowest compute capability the kernels run on."""

_lock = threading.RLock()


def module_for(name: str, fmt: PageFormat) -> str:
    """Key of `MODULES` for pages of a format."""
    return f"paper_{name}" if fmt.preset == "paper" else name


def cache_folder() -> Path:
    """Folder of compiled kernels: SELFINDEX_CACHE, or the user's cache folder."""
    chosen = os.environ.get("SELFINDEX_CACHE")
    if chosen:
        return Path(chosen)
    variable, place = (
        ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    )
    given = os.environ.get(variable)
    return (Path(given) if given else Path.home() / place) / "selfindex"


def source(module: str) -> str:
    """Text of a module, a key of `MODULES`."""
    return "\n".join((SOURCES / f"{name}.cuh").read_text() for name in MODULES[module])


def macros(head_dim: int, groups: int, value_bits: int, dtype: torch.dtype, arch: int) -> dict[str, str]:
    """What a module is specialised for; `arch` is 80, 90, ..."""
    found = {
        "D": str(head_dim),
        "G": str(groups),
        "VALUE_BITS": str(value_bits),
        "IN_TYPE": str(INPUT_TYPES[dtype]),
        "SIGN_GAIN": f"{SIGN_GAIN!r}f",
        "SELECT_SHARPNESS": f"{SHARPNESS!r}f",
        "CLUSTERS": str(int(arch >= 90)),
        "WGMMA": str(int(arch == 90 and head_dim in (64, 128))),
    }
    if head_dim == 96:
        paley = hadamard(96)[:12, :12] < 0
        found["PALEY_ROWS"] = ",".join(
            str(sum(1 << j for j in range(12) if row[j])) for row in paley.tolist()
        )
    return found


def compile_module(module: str, arch: int, defines: dict[str, str]) -> tuple[bytes, str]:
    """Compile for one architecture; needs no GPU.

    Returns:
        (cubin, the compiler's log with register counts and spills).

    Raises:
        KernelsUnavailable: cuda-core is missing or too old, or its compiler fails.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise KernelsUnavailable(
            f"cuda-core cannot be imported ({error}); pip install 'selfindex[cuda]' brings it"
        ) from error

    class Log:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

    log = Log()
    options = ProgramOptions(
        name=f"selfindex_{module}",
        # Hopper's warp group instructions exist for its own feature set only.
        arch=f"sm_{arch}a" if module.endswith("dense") and arch == 90 else f"sm_{arch}",
        std="c++17",
        define_macro=list(defines.items()),
        ptxas_options=["-v"],
    )
    try:
        code = Program(source(module), "c++", options).compile("cubin", logs=log).code
    except Exception as error:
        # NVRTC is missing, does not know the architecture, or fails: cuda-core has an exception for each.
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise KernelsUnavailable(f"the {module} kernels do not compile for sm_{arch} ({reason})") from error
    return bytes(code), log.text


def cubin(module: str, arch: int, defines: dict[str, str], anew: bool = False) -> bytes:
    """Machine code from the disk cache, compiled and stored there when it is missing or wanted `anew`.

    Entries are written beside their place and renamed into it, so concurrent processes see whole
    files; a folder that cannot be written costs one warning and a compilation per process.
    """
    text = "\0".join((source(module), module, str(arch), repr(sorted(defines.items())), _compiler()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        path = cache_folder() / f"{module}-sm{arch}-{digest[:32]}.cubin"
    except RuntimeError as error:  # of Path.home
        _warn_cache(f"compiled kernels cannot be kept ({error}); set SELFINDEX_CACHE to a folder")
        return compile_module(module, arch, defines)[0]
    try:
        stored = b"" if anew else path.read_bytes()
        # The file ends with a checksum of its content: a truncated or damaged one is replaced.
        if stored and hashlib.sha256(stored[:-32]).digest() == stored[-32:]:
            return stored[:-32]
    except OSError:
        pass
    code, _ = compile_module(module, arch, defines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code + hashlib.sha256(code).digest())
            os.replace(name, path)
        except BaseException:
            # Also Ctrl-C: a part of a file nobody would ever remove.
            os.unlink(name)
            raise
    except OSError as error:
        _warn_cache(
            f"compiled kernels cannot be kept in {path.parent} ({error}); every process compiles them"
        )
    return code


@cache
def _warn_cache(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@cache
def _compiler() -> str:
    """Versions that decide what the compiler makes of a source."""
    found = []
    for name in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device.

    Raises:
        KernelsUnavailable: it is below `OLDEST`.
    """
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        raise KernelsUnavailable(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}; "
            f"the kernels need {OLDEST[0]}.{OLDEST[1]}"
        )
    return found


@cache
def _load(
    module: str, device: int, head_dim: int, groups: int, value_bits: int, dtype: torch.dtype
) -> dict[str, Kernel]:
    major, minor = capability(torch.device("cuda", device))
    arch = 10 * major + minor
    defines = macros(head_dim, groups, value_bits, dtype, arch)
    code = cubin(module, arch, defines)
    try:
        return open_module(code, device)
    except KernelsUnavailable:
        # Perhaps only what was kept on disk is at fault.
        return open_module(cubin(module, arch, defines, anew=True), device)


_refused: dict[tuple[Any, ...], str] = {}
"""Why modules cannot be had: finding out takes seconds, and a decode step asks once a layer."""


def load(
    module: str, device: torch.device, head_dim: int, groups: int, value_bits: int, dtype: torch.dtype
) -> dict[str, Kernel]:
    """Kernels of a module by name, ready to launch on `device`.

    Raises:
        KernelsUnavailable: cuda-core is missing, the GPU is too old, or compiling or loading fails.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    what = module, index, head_dim, groups, value_bits, dtype
    with _lock:
        if what in _refused:
            raise KernelsUnavailable(_refused[what])
        try:
            return _load(*what)
        except KernelsUnavailable as error:
            _refused[what] = str(error)
            raise
