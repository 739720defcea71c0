"""The CUDA kernels compile for every supported generation of GPUs, without spilling registers."""

import hashlib
import os
import re
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from selfindex.backends.cuda import loader

# What decides which code is generated: head_dim, both value formats, 1 to 4 quads of query heads.
DECODE = (
    (128, 4, 2, torch.bfloat16),
    (96, 5, 3, torch.bfloat16),
    (256, 8, 3, torch.bfloat16),
    (128, 16, 2, torch.float32),
    (64, 1, 3, torch.float16),
)
ENCODE = (
    (128, 1, 2, torch.bfloat16),
    (256, 1, 3, torch.float16),
    (96, 1, 3, torch.bfloat16),
    (64, 1, 2, torch.float32),
)
DENSE = (
    (128, 1, 2, torch.bfloat16),
    (256, 1, 3, torch.float16),
    (96, 1, 3, torch.float32),
    (64, 1, 2, torch.bfloat16),
)
WINDOW = (
    (128, 4, 2, torch.bfloat16),
    (256, 16, 2, torch.float32),
    (96, 5, 2, torch.float16),
)
KERNELS = {
    "decode": 4,
    "offloaded": 2,
    "encode": 2,
    "dense": 3,
    "window": 4,
    "balance": 2,
    "statistics": 1,
    "pages": 1,
    "join": 1,
}
# Everything for the architecture the kernels are tuned for, what differs most for the others.
SHAPES = {
    "decode": DECODE,
    "offloaded": DECODE,
    "encode": ENCODE,
    "dense": DENSE,
    "window": WINDOW,
    "balance": ENCODE,
    "statistics": ENCODE,
    "pages": ENCODE,
    "join": ENCODE,
}
for name in ("decode", "offloaded", "encode", "dense", "pages"):
    SHAPES[f"paper_{name}"] = tuple((*case[:2], 2, case[3]) for case in SHAPES[name])
    KERNELS[f"paper_{name}"] = KERNELS[name]
CASES = [(90, module, case) for module, cases in SHAPES.items() for case in cases]
for other in (80, 100):
    for module, cases in SHAPES.items():
        CASES += [(other, module, case) for case in cases[: 2 if module.endswith(("decode", "dense")) else 1]]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "module", "case"), CASES)
def test_kernels_compile_without_spills(architecture, module, case):
    code, log = loader.compile_module(module, architecture, loader.macros(*case, architecture))
    assert code[:4] == b"\x7fELF"
    kernels = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(kernels) == len(spills) >= KERNELS[module]
    spilled = {name: n for name, n in zip(kernels, spills, strict=True) if n != ("0", "0")}
    assert not spilled, "registers spill"


def test_an_entry_of_the_disk_cache_is_reused_and_a_damaged_one_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path / "cache"))
    calls = []

    def fake(module, architecture, defines):
        calls.append(module)
        return b"code %d" % len(calls), ""

    monkeypatch.setattr(loader, "compile_module", fake)
    defines = loader.macros(128, 4, 2, torch.bfloat16, 90)
    assert loader.cubin("decode", 90, defines) == b"code 1"
    assert loader.cubin("decode", 90, defines) == b"code 1"
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert loader.cubin("decode", 90, defines) == b"code 2"
    assert loader.cubin("decode", 90, defines) == b"code 2"
    assert loader.cubin("decode", 80, loader.macros(128, 4, 2, torch.bfloat16, 80)) == b"code 3"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_processes_that_compile_at_once_leave_one_whole_entry(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "compile_module", lambda *_: (bytes(range(256)) * 100, ""))
    defines = loader.macros(64, 1, 2, torch.float16, 90)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: loader.cubin("encode", 90, defines), range(32)))
    assert set(found) == {bytes(range(256)) * 100}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_two_processes_compile_the_same_kernel_at_once(tmp_path):
    program = (
        "import torch; from selfindex.backends.cuda import loader;"
        "d = loader.macros(64, 1, 2, torch.float16, 90);"
        "import hashlib; print(hashlib.sha256(loader.cubin('join', 90, d)).hexdigest())"
    )
    environment = os.environ | {"SELFINDEX_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    digests = {process.communicate(timeout=900)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (entry,) = tmp_path.iterdir()
    assert digests == {hashlib.sha256(entry.read_bytes()[:-32]).hexdigest()}


@pytest.fixture
def warned():
    loader._warn_cache.cache_clear()
    yield
    loader._warn_cache.cache_clear()


def test_a_full_disk_costs_one_warning_and_leaves_no_part_of_a_file(tmp_path, monkeypatch, warned):
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "compile_module", lambda *_: (bytes(100_000), ""))
    defines = loader.macros(64, 1, 2, torch.float16, 90)
    # The operating system refuses to write more than this, as it does where the disk is full.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.warns(RuntimeWarning, match="cannot be kept") as caught:
            found = [loader.cubin("encode", 90, defines) for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found == [bytes(100_000)] * 2
    assert len(caught) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_read_only_folder_costs_one_warning_and_can_be_read(tmp_path, monkeypatch, warned):
    folder = tmp_path / "cache"
    monkeypatch.setenv("SELFINDEX_CACHE", str(folder))
    monkeypatch.setattr(loader, "compile_module", lambda module, *_: (module.encode(), ""))
    defines = loader.macros(64, 1, 2, torch.float16, 90)
    assert loader.cubin("encode", 90, defines) == b"encode"
    for path in folder.iterdir():
        path.chmod(0o444)
    for path in (folder, tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o555 if path == folder else 0o755)
    monkeypatch.setattr(loader, "source", lambda module: module)  # the sources may be out of its reach
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # the administrator may write anywhere
        with pytest.warns(RuntimeWarning, match="cannot be kept"):
            assert loader.cubin("dense", 90, defines) == b"dense"
    finally:
        os.seteuid(user)
    assert len(list(folder.iterdir())) == 1
    folder.chmod(0o755)


def test_an_interrupt_while_an_entry_is_written_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path))
    monkeypatch.setattr(loader, "compile_module", lambda *_: (b"code", ""))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        loader.cubin("encode", 90, loader.macros(64, 1, 2, torch.float16, 90))
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch, warned):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(loader, "compile_module", lambda *_: (b"code", ""))
    defines = loader.macros(64, 1, 2, torch.float16, 90)
    with pytest.warns(RuntimeWarning, match="cannot be kept") as caught:
        found = [loader.cubin("encode", 90, defines) for _ in range(2)]
    assert found == [b"code", b"code"]
    assert len(caught) == 1


def test_missing_cuda_core_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(loader.KernelsUnavailable, match=r"pip install 'selfindex\[cuda\]'"):
        loader.compile_module("encode", 90, loader.macros(64, 1, 2, torch.float16, 90))


def test_an_old_gpu_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    with pytest.raises(loader.KernelsUnavailable, match=r"Old GPU has compute capability 7\.5"):
        loader.capability(torch.device("cuda", 0))
