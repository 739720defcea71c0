import runpy
import sys

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
    monkeypatch.setattr(doctor, "check", lambda preset, d, device: Check(preset, d, 1.0, ["it is broken"]))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "it is broken" in result.output
    assert "failed" in result.output


def test_doctor_names_missing_parts(invoke, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda preset, d, device: Check(preset, d, 0.0, []))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert 'missing: pip install "selfindex[demo]"' in result.output


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_check_passes(preset):
    assert check(preset, 64, torch.device("cpu")).failures == []


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
