"""What the CUDA driver and compiler can say: the reference runs and says why, or there is one clear error."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from selfindex import DeviceError
from selfindex.backends.cuda import launch, loader
from selfindex.backends.cuda.decode import plan
from selfindex.backends.cuda.launch import KernelsUnavailable
from selfindex.backends.fallback import announce, with_fallback

driver = pytest.importorskip("cuda.bindings.driver")
GOOD = driver.CUresult.CUDA_SUCCESS
SHAPE = 0, 128, 4, 2, torch.bfloat16


def named(name):
    return getattr(driver.CUresult, f"CUDA_ERROR_{name}")


@pytest.fixture
def kernel(monkeypatch):
    """A kernel whose driver answers launches with `answer`."""
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    answers = SimpleNamespace(answer=GOOD)
    fake = SimpleNamespace(CUfunction_attribute=None, cuLaunchKernelEx=lambda *_: (answers.answer,))
    made = launch.Kernel(None, fake, 0, clusters=False)
    return SimpleNamespace(answers=answers, launch=lambda: made((1, 1), 32, [ctypes.c_int(1)]))


REFUSED = (
    *("INVALID_VALUE", "LAUNCH_OUT_OF_RESOURCES", "NO_BINARY_FOR_GPU", "NOT_SUPPORTED"),
    *("INVALID_CLUSTER_SIZE", "UNSUPPORTED_PTX_VERSION", "INVALID_IMAGE"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_where_a_launch_is_refused_the_reference_runs_and_says_why_once(name, kernel, recwarn):
    announce.cache_clear()
    run = with_fallback("GPU", kernel.launch, lambda: "reference", lambda: True, KernelsUnavailable)
    assert run() is None
    kernel.answers.answer = named(name)
    assert [run(), run()] == ["reference"] * 2
    (warning,) = recwarn
    assert f"refuses a kernel: CUDA_ERROR_{name}" in str(warning.message)
    kernel.answers.answer = GOOD
    assert run() is None, "the next call is served again"


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("OUT_OF_MEMORY", torch.OutOfMemoryError, "no room to load or launch a kernel"),
        ("ILLEGAL_ADDRESS", DeviceError, "work launched before it; start the process again"),
        ("LAUNCH_FAILED", DeviceError, "start the process again"),
        ("STREAM_CAPTURE_UNSUPPORTED", DeviceError, "CUDA graph being captured"),
    ],
)
def test_what_no_other_operator_can_mend_is_one_clear_error(name, error, match, kernel):
    kernel.answers.answer = named(name)
    run = with_fallback("GPU", kernel.launch, lambda: "reference", lambda: True, KernelsUnavailable)
    with pytest.raises(error, match=match):
        run()


def test_the_statuses_of_a_lost_gpu_are_the_drivers():
    lost = {driver.CUresult(code).name for code in launch.LOST}
    assert {"CUDA_ERROR_ECC_UNCORRECTABLE", "CUDA_ERROR_ASSERT", "CUDA_ERROR_UNKNOWN"} <= lost
    assert named("OUT_OF_MEMORY").value == launch.OUT_OF_MEMORY
    capture = {r.value for r in driver.CUresult if "STREAM_CAPTURE" in r.name}
    assert capture
    assert capture <= set(launch.CAPTURING)


@pytest.fixture
def loading(monkeypatch, tmp_path):
    """A machine with a GPU of compute capability 9.0; counts what is compiled and opened."""
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(loader, "_refused", {})
    calls = SimpleNamespace(compiled=0, opened=[], errors={})

    def compile_module(*_):
        calls.compiled += 1
        if "compile" in calls.errors:
            raise calls.errors["compile"]
        return b"code %d" % calls.compiled, ""

    def open_module(code, device):
        calls.opened.append(code)
        if code in calls.errors:
            raise calls.errors[code]
        return {"kernel": code}

    monkeypatch.setattr(loader, "compile_module", compile_module)
    monkeypatch.setattr(loader, "open_module", open_module)
    loader._load.cache_clear()
    yield calls
    loader._load.cache_clear()


def load():
    return loader.load("decode", torch.device("cuda", 0), *SHAPE[1:])


def test_kept_machine_code_that_does_not_load_is_compiled_anew(loading):
    loading.errors[b"code 1"] = KernelsUnavailable("the CUDA driver refuses a kernel")
    assert load() == {"kernel": b"code 2"}
    loader._load.cache_clear()
    assert load() == {"kernel": b"code 2"}
    assert loading.compiled == 2


@pytest.mark.parametrize("where", ["compile", "open"])
def test_a_module_that_cannot_be_had_is_tried_once(loading, where):
    error = KernelsUnavailable("too new")
    loading.errors = {"compile": error} if where == "compile" else {b"code 1": error, b"code 2": error}
    for _ in range(3):
        with pytest.raises(KernelsUnavailable, match="too new"):
            load()
    assert loading.compiled == (1 if where == "compile" else 2)


def test_a_module_that_had_no_memory_is_tried_again(loading):
    loading.errors[b"code 1"] = torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError):
        load()
    loading.errors.clear()
    assert load() == {"kernel": b"code 1"}


def test_what_the_compiler_says_is_told(monkeypatch):
    core = pytest.importorskip("cuda.core")

    def program(*_):
        raise RuntimeError("NVRTC_ERROR_INVALID_OPTION: sm_90a\nand more")

    monkeypatch.setattr(core, "Program", program)
    with pytest.raises(KernelsUnavailable, match=r"decode kernels do not compile for sm_90 \(.*sm_90a\)$"):
        loader.compile_module("decode", 90, loader.macros(*SHAPE[1:], 90))


def test_without_a_home_folder_kernels_are_compiled_by_every_process(monkeypatch, recwarn):
    for name in ("SELFINDEX_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(loader.Path, "home", home)
    monkeypatch.setattr(loader, "compile_module", lambda *_: (b"code", ""))
    loader._warn_cache.cache_clear()
    assert loader.cubin("encode", 90, loader.macros(*SHAPE[1:], 90)) == b"code"
    assert "set SELFINDEX_CACHE" in str(recwarn.pop().message)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert loader.cache_folder().parts[-2:] == ("somewhere", "selfindex")


def test_a_device_on_which_no_launch_fits_is_the_references():
    with pytest.raises(KernelsUnavailable, match="no launch"):
        plan(8, 100, 2048, 1, 0, {8: 100_000}, True, 4, lambda *_: 0)


@pytest.mark.gpu
def test_a_real_driver_refuses_too_much_shared_memory_and_goes_on():
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = loader.load("decode", device, *SHAPE[1:])
    with pytest.raises(KernelsUnavailable, match="CUDA_ERROR_INVALID_VALUE"):
        kernels["merge"]((1, 1), 256, [ctypes.c_int(0)], shared=1 << 20)
    assert (torch.zeros(3, device=device) + 1).sum() == 3


@pytest.mark.gpu
def test_a_real_driver_refuses_what_is_no_machine_code():
    with pytest.raises(KernelsUnavailable, match="CUDA_ERROR_INVALID_IMAGE"):
        launch.open_module(b"\x7fELF" + bytes(1000), torch.cuda.current_device())
    assert (torch.zeros(3, device="cuda") + 1).sum() == 3
