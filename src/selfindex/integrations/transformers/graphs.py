"""CUDA graphs of decode steps: recording, and what has to stay as it was for one to be replayed."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep the garbage collector from running: another graph that it destroys would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_capturing = threading.Lock()

_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams of recorders that are gone, for the next ones: cuBLAS keeps a workspace for each (32 MiB on
Hopper)."""


class Recorder:
    """Records graphs on a stream of its own, and into memory that they share.

    Graphs that run at the same time must not come from one recorder.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        free = _streams.setdefault(device, [])
        if free:
            # Another recorder's graph may still use cuBLAS's workspace.
            torch.cuda.synchronize(device)
            self._stream = free.pop()
        else:
            self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        weakref.finalize(self, free.append, self._stream).atexit = False

    def record(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `run` does. Runs it once before: kernels compile, libraries allocate."""
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            run()
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile.
            capture = torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local")
            with _capturing, without_collection(), capture:
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph


KNOWN_HOOKS = ("transformers.", "selfindex.")
"""Where hooks come from that a replay can do without: they collect hidden states where these are asked
for, or switch the attention of a pass."""


class RecordedModel:
    """What a graph took from a model that Python could change: where its weights are, and its hooks.

    Args:
        model: the model that was recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        inner = list(model.modules())[1:]  # hooks of the model itself run around a replay as well
        self._inner = [weakref.ref(module) for module in inner]
        self._weights = [weakref.ref(x) for x in (*model.parameters(), *model.buffers())]
        self._places = self._now()
        self._hooked: str | None = None
        self._hooks_seen = -1

    def _now(self) -> list[int | None]:
        return [None if (x := weight()) is None else x.data_ptr() for weight in self._weights]

    def unchanged(self) -> bool:
        """Whether a graph recorded then reads the weights that the model has now."""
        return self._places == self._now()

    def hooked(self) -> str | None:
        """The class of a submodule with hooks, which a replay would not call; None if there is none."""
        # Hooks are numbered: without a new one, there is none where there was none.
        if self._hooked is not None or self._hooks_seen != RemovableHandle.next_id:
            self._hooked, self._hooks_seen = self._find_hooks(), RemovableHandle.next_id
        return self._hooked

    def _find_hooks(self) -> str | None:
        for reference in self._inner:
            module = reference()
            if module is not None:
                hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
                if any(not str(getattr(hook, "__module__", "")).startswith(KNOWN_HOOKS) for hook in hooks):
                    return type(module).__name__
        return None
