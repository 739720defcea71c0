"""Every test here runs once per instruction set that this processor has."""

import pytest

from selfindex.backends.cpu.loader import SETS, NativeUnavailable, native


def available():
    try:
        return native().instruction_sets()
    except NativeUnavailable:
        return []


@pytest.fixture(params=SETS)
def isa(request, monkeypatch):
    """Name of a forced instruction set."""
    if request.param not in available():
        pytest.skip(f"no compiled operators for {request.param} here")
    monkeypatch.setenv("SELFINDEX_CPU", request.param)
    return request.param
