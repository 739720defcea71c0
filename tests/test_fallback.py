"""Who serves a call: the fast implementation, or the reference with one announcement."""

import warnings

import pytest
from test_ops import arguments  # noqa: F401

from selfindex.backends import reference
from selfindex.backends.cuda import balance, decode, dense, encode, join, offloaded, pages, window
from selfindex.backends.cuda import register as register_cuda
from selfindex.backends.cuda.launch import KernelsUnavailable
from selfindex.backends.fallback import announce, observed, with_fallback

MODULES = {
    **dict.fromkeys(("encode", "encode_into", "encode_paged"), encode),
    **{"sparse_decode": decode, "dense_attend": dense, "measure_balance": balance},
    **{"decode_pages": pages, "merge_into": join},
    **dict.fromkeys(("window_attend", "paged_window_attend"), window),
}
HOMES = MODULES | {"sparse_decode": offloaded}


class Recorder:
    """Keeps what is registered."""

    def __init__(self):
        self.found = {}

    def __call__(self, name, device, function):
        self.found[name] = function


@pytest.mark.parametrize("name", MODULES)
def test_the_cuda_operators_are_wired(name, arguments, monkeypatch):  # noqa: F811
    announce.cache_clear()
    given = arguments[name]
    calls = []

    def kernel(*received):
        calls.append(received)
        if len(calls) > 1:
            raise KernelsUnavailable("it is too old")
        return "kernel"

    monkeypatch.setattr(HOMES[name], name, kernel)
    judge = "paged_supported" if name == "paged_window_attend" else "supported"
    monkeypatch.setattr(MODULES[name], judge, lambda *chosen: True)
    monkeypatch.setattr(reference, name, lambda *received: "reference")
    recorder = Recorder()
    register_cuda(recorder)
    run = recorder.found[name]
    assert run(*given) == "kernel"
    assert all(one is other for one, other in zip(calls[0], given, strict=True))
    with pytest.warns(RuntimeWarning, match="on the GPU: it is too old"):
        assert run(*given) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(*given) == "reference", "said once"
    monkeypatch.setattr(MODULES[name], judge, lambda *chosen: False)
    assert run(*given) == "reference"
    assert len(calls) == 3


def test_who_served_a_call_can_be_observed():
    def add(*numbers):
        return sum(numbers)

    def fails(*_):
        raise KernelsUnavailable("out of order")

    seen, others = [], []
    fast = with_fallback("GPU", add, add, lambda *numbers: len(numbers) == 2, KernelsUnavailable)
    broken = with_fallback(
        "GPU", fails, add, lambda *_: True, KernelsUnavailable, silent=(KernelsUnavailable,)
    )
    with observed(lambda *call: seen.append(call)):
        with observed(lambda *call: others.append(call)):
            assert fast(1, 2) == 3
        assert fast(1, 2, 3) == 6
        assert broken(4) == 4
    assert fast(5, 6) == 11
    assert seen == [("add", True, (1, 2)), ("add", False, (1, 2, 3)), ("add", False, (4,))]
    assert others == seen[:1]
