import runpy
import sys

import backends
import pytest
import torch
import transformers

import selfindex
from selfindex.backends import ops
from selfindex.cli import doctor
from selfindex.cli.selfcheck import Check, check


def test_doctor_passes(invoke):
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for expected in (
        selfindex.__version__,
        torch.__version__,
        transformers.__version__,
        "cpu: plain PyTorch",
        "passed",
    ):
        assert expected in result.output
    assert "fail" not in result.output


def test_doctor_fails(invoke, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda preset, d, *_: Check(preset, d, 1.0, ["it is broken [/]"]))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "it is broken [/]" in result.output
    assert "failed" in result.output


def test_doctor_names_missing_parts(invoke, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda preset, d, *_: Check(preset, d, 0.0, []))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert 'missing: pip install "selfindex[demo]"' in result.output


@backends.every
@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_check_passes_and_says_who_ran(backend, preset, dtype):
    found = check(preset, 64, torch.device(backend.device), dtype)
    assert found.failures == []
    # A page of 128 tokens, one new token and chunks below and above what kernels for few queries take.
    shapes = [f"{operator} of a {chunk}" for operator, chunk in SHAPES]
    every = {"encode", "window_attend", *shapes}
    if preset == "paper":
        every.add("prompt_statistics")
    if backend.device == "cuda":  # where chunks are long enough, pages are decoded to memory
        every |= {"decode_pages", "merge_into"}
    fast = set() if backend.name == "reference" else every
    assert set(found.fast) == fast
    assert set(found.slow) == every - fast


SHAPES = [
    ("sparse_decode", "decode step"),
    ("sparse_decode", "short chunk"),
    ("dense_attend", "decode step"),
    ("dense_attend", "short chunk"),
    ("dense_attend", "long chunk"),
]


@backends.on_cpu
def test_doctor_says_what_runs_and_what_is_slower(backend, invoke):
    lines = invoke("doctor").output.splitlines()
    if backend.name == "compiled":
        for preset in ("balanced", "paper"):
            assert any(
                line.startswith(f"{preset}: compiled operators") and "everything" in line for line in lines
            )
            assert not any(line.startswith(f"{preset}: plain PyTorch") for line in lines)
    else:
        for preset in ("balanced", "paper"):
            assert f"{preset}: plain PyTorch, which is slower, ran everything" in lines
    assert any("pages of 128 tokens" in line for line in lines)


@pytest.mark.gpu
def test_doctor_runs_the_kernels_of_a_gpu(invoke):
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    for preset in ("balanced", "paper"):
        assert f"{preset}: CUDA kernels, ran " in result.output


@pytest.mark.parametrize("backend", ["compiled"], indirect=True)
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("encode", "encode gives other bytes"),
        ("sparse_decode", "sparse_decode of a decode step differs"),
        ("dense_attend", "dense_attend of a long chunk differs"),
        ("window_attend", "window_attend differs"),
        ("prompt_statistics", "prompt_statistics differs"),
    ],
)
def test_doctor_fails_where_a_compiled_operator_is_wrong(backend, invoke, monkeypatch, name, match):
    right = getattr(ops, name)

    def wrong(*arguments):
        result = right(*arguments)
        if name == "encode":
            result[1][:, ::50] += 1
            return result
        # As much as one exchanged token.
        return (result[0] * 1.01, result[1]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(ops, name, wrong)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert match in result.output


def test_doctor_fails_where_an_operator_raises(invoke, monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access [was] encountered")

    monkeypatch.setattr(ops, "sparse_decode", broken)
    result = invoke("doctor")
    assert result.exit_code == 1
    said = " ".join(result.output.split())  # without the line breaks of a narrow screen
    assert "RuntimeError: an illegal memory access [was] encountered" in said


def test_check_finds_a_wrong_operator(monkeypatch):
    right = ops.sparse_attend

    def wrong(*arguments):
        output, lse = right(*arguments)
        return output * 1.01, lse

    monkeypatch.setattr(ops, "sparse_attend", wrong)
    assert any(
        "sparse_attend differs" in failure for failure in check("balanced", 64, torch.device("cpu")).failures
    )


def test_check_finds_a_wrong_selection(monkeypatch):
    right = ops.select
    monkeypatch.setattr(ops, "select", lambda scores, *rest: right(-scores, *rest))
    failures = check("balanced", 64, torch.device("cpu")).failures
    assert any("sorted top" in failure for failure in failures)
    assert any("missed" in failure for failure in failures)


def test_version_and_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["selfindex", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("selfindex", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"selfindex {selfindex.__version__}"


def test_doctor_says_why_the_kernels_do_not_run(monkeypatch):
    def too_old(device):
        raise doctor.KernelsUnavailable("it is too old")

    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor, "capability", too_old)
    assert doctor._backends()[1] == ("cuda:0", "plain PyTorch: it is too old")


def test_doctor_names_the_cpu_backend(monkeypatch):
    assert doctor._backends()[0] == ("cpu", "plain PyTorch: SELFINDEX_CPU=reference")
    monkeypatch.setattr(doctor, "instruction_set", lambda: "avx2")
    assert doctor._backends()[0][1].startswith("compiled operators, avx2")
