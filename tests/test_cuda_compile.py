"""The CUDA kernels compile for every supported generation of GPUs, without spilling registers."""

import re
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
KERNELS = {"decode": 3, "offloaded": 2, "encode": 1, "dense": 3, "window": 2}
# Everything for the architecture the kernels are tuned for, what differs most for the others.
SHAPES = {"decode": DECODE, "offloaded": DECODE, "encode": ENCODE, "dense": DENSE, "window": WINDOW}
CASES = [(90, module, case) for module, cases in SHAPES.items() for case in cases]
for other in (80, 100):
    CASES += [(other, "decode", case) for case in DECODE[:3]]
    for module in ("offloaded", "encode", "dense", "window"):
        CASES += [(other, module, case) for case in SHAPES[module][:2]]


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


def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
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
