"""Which implementation runs, and what is said about it."""

import shutil
import warnings
from importlib import metadata

import pytest
import torch
from encoded_cache import make_cache

from selfindex.backends import ops, reference
from selfindex.backends.cpu import loader
from selfindex.backends.fallback import announce


@pytest.fixture(autouse=True)
def _forget():
    announce.cache_clear()
    yield
    announce.cache_clear()
    loader._instruction_set.cache_clear()


def test_an_installation_with_a_compiler_has_the_compiled_operators():
    try:
        metadata.distribution("selfindex")
    except metadata.PackageNotFoundError:
        pytest.skip("selfindex is not installed, only on the path")
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    assert "generic" in loader.native().instruction_sets()


def test_forced_sets(monkeypatch, isa):
    assert loader.instruction_set() == isa
    monkeypatch.setenv("SELFINDEX_CPU", "")
    assert loader.instruction_set() == loader.native().instruction_sets()[0]
    monkeypatch.setenv("SELFINDEX_CPU", "mmx")
    with pytest.raises(loader.NativeUnavailable, match="mmx is none of"):
        loader.instruction_set()


def test_a_set_the_processor_lacks_is_refused(monkeypatch, isa):
    class Old:
        @staticmethod
        def instruction_sets():
            return ["generic"]

    monkeypatch.setattr(loader, "native", Old)
    monkeypatch.setenv("SELFINDEX_CPU", "avx512")
    loader._instruction_set.cache_clear()
    with pytest.raises(loader.NativeUnavailable, match="has only generic"):
        loader.instruction_set()


def test_without_the_module_the_reference_runs_and_says_so_once(monkeypatch):
    def missing():
        raise loader.NativeUnavailable("there is no compiler")

    monkeypatch.setattr(loader, "native", missing)
    monkeypatch.delenv("SELFINDEX_CPU")
    loader._instruction_set.cache_clear()
    cache = make_cache([300])
    with pytest.warns(RuntimeWarning, match="slower PyTorch implementation on the CPU: there is no compiler"):
        got = ops.dense_attend(*cache.dense_arguments())
    assert torch.equal(got[0], reference.dense_attend(*cache.dense_arguments())[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.sparse_decode(*cache.decode_arguments([20]))
    assert torch.equal(got[0], reference.sparse_decode(*cache.decode_arguments([20]))[0])


def test_the_reference_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SELFINDEX_CPU", "reference")
    cache = make_cache([300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = ops.sparse_decode(*cache.decode_arguments([20]))
    assert torch.equal(got[0], reference.sparse_decode(*cache.decode_arguments([20]))[0])
