"""Makes a call fail, or lets something else happen, at its n-th tensor operation or line of our code."""

import linecache
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import selfindex

# The files that hold state; operators only compute.
STATEFUL = tuple(str(Path(selfindex.__file__).parent / name) for name in ("store", "integrations"))


class AtOperation(TorchDispatchMode):
    """Raises `error` instead of running operation `number`; real memory runs out in one of them."""

    def __init__(self, number, error):
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == -1:
            raise self.error
        return func(*args, **(kwargs or {}))

    @property
    def happened(self):
        return self.left < 0


def _deleting(frame):
    """Whether an object is being deleted: Python swallows what is raised there, wherever that happens."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _leaving(frame, entered):
    """Whether a `with` is about to end: its line comes once more, where Python never looks for signals."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if not line.lstrip().startswith("with "):
        return False
    entered[frame.f_lineno] = not entered.get(frame.f_lineno, False)
    return not entered[frame.f_lineno]


class AtLine:
    """Raises `error` before line `number` of the files that hold state, as Ctrl-C may."""

    def __init__(self, number, error):
        self.left, self.error = number, error

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(STATEFUL) or _deleting(frame):
            return None
        entered = {}

        def lines(frame, event, _):
            if event == "line" and not _leaving(frame, entered):
                self.left -= 1
                if self.left == -1:
                    self.strike()
            return lines

        return lines

    def strike(self):
        raise self.error

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    @property
    def happened(self):
        return self.left < 0


class Meanwhile(AtLine):
    """Calls `act` before line `number`, as the garbage collector and a signal's handler may."""

    def __init__(self, number, act):
        super().__init__(number, None)
        self.strike = act


@contextmanager
def fault(kind, number):
    """Run the body with a fault in it; yields an object whose `happened` says whether it came."""
    error = (
        torch.OutOfMemoryError("CUDA out of memory (for a test)")
        if kind is AtOperation
        else KeyboardInterrupt()
    )
    injected = kind(number, error)
    try:
        with injected:
            yield injected
    except (torch.OutOfMemoryError, KeyboardInterrupt) as raised:
        if raised is not error:
            raise
