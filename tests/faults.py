"""Makes a call fail at a chosen place: at its n-th tensor operation, or at its n-th line of our code."""

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


class AtLine:
    """Raises `error` before line `number` of the files that hold state, as Ctrl-C may."""

    def __init__(self, number, error):
        self.left, self.error = number, error

    def _trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(STATEFUL) or _deleting(frame):
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                raise self.error
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    @property
    def happened(self):
        return self.left < 0


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
