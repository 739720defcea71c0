"""Which implementation of the operators serves a test, and the sizes and the device that it needs.

A module runs on several of them with `pytestmark = backends.every`. Its models are then on the
backend's device and its pages have the backend's size, as long as it uses tiny_models, stores and
decoded_cache, which take and give CPU tensors; `scaled` makes lengths that fill as many pages.
"""

from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from selfindex.backends.cpu.loader import NativeUnavailable, native
from selfindex.backends.fallback import observed

WINDOW = 12
"""Full-precision tokens that the small caches of the tests keep besides a page that is not full."""


@dataclass
class Backend:
    """Calls of the operators: `fast[name]`, and `slow` ones that a faster operator should have served."""

    name: str
    device: str = "cpu"
    page_size: int = 8
    fast: Counter = field(default_factory=Counter)
    slow: list = field(default_factory=list)

    def note(self, name, fast, arguments):
        if fast and name == "step_attend":  # both in one
            self.fast["dense_attend" if arguments[7] is None else "sparse_decode"] += 1
            self.fast["window_attend"] += 1
        elif fast:
            self.fast[name] += 1
        elif not self._left_to_pytorch(name, arguments):
            self.slow.append((name, [tuple(x.shape) for x in arguments if isinstance(x, torch.Tensor)]))

    def _left_to_pytorch(self, name, arguments):
        """Whether that is as documented: no queries; on a GPU several that select for themselves."""
        several = name == "sparse_decode" and self.device == "cuda" and arguments[0].shape[2] > 1
        return arguments[-1 if name == "merge_into" else 0].numel() == 0 or several

    def check_ran(self, *names):
        """These operators have run, and not only their PyTorch forms."""
        if self.name != "reference":
            assert not set(names) - set(self.fast), self.fast


current = Backend("reference")

_here = [pytest.param("reference"), pytest.param("compiled")]
on_cpu = pytest.mark.parametrize("backend", _here, indirect=True)
every = pytest.mark.parametrize(
    "backend", [*_here, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@contextmanager
def use(name, monkeypatch):
    """Run a test on a backend: "reference", "compiled" or "cuda"."""
    global current
    # Pages of 128 tokens are what the CUDA kernels serve.
    chosen = Backend(name, "cuda", 128) if name == "cuda" else Backend(name)
    if name == "compiled":
        monkeypatch.delenv("SELFINDEX_CPU", raising=False)
        try:
            native()
        except NativeUnavailable as error:
            pytest.skip(str(error))
    else:
        monkeypatch.setenv("SELFINDEX_CPU", "reference")
    before, current = current, chosen
    try:
        with nullcontext() if name == "reference" else observed(chosen.note):
            yield chosen
    finally:
        current = before
    if name != "reference":
        assert not chosen.slow, f"PyTorch ran instead of the {name} operators: {chosen.slow[:3]}"


def scaled(tokens):
    """As many tokens as fill, with the backend's pages, the pages that `tokens` fill with pages of 8."""
    return tokens + max(0, tokens - WINDOW) // 8 * (current.page_size - 8)
