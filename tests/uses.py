"""Ways to use a cache, each from beginning to end, and the memory that many repetitions leave behind."""

import contextlib
import copy
import ctypes
import gc
import tempfile
from pathlib import Path

import torch
from tiny_models import forward, generate, make_model, prompt

import selfindex

TOKENS = 400


class Uses:
    """Methods that are called again and again: all work has the same shapes.

    Args:
        device: of the model, a tiny Llama.
        dtype: of the model.
    """

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device = device
        self.model = make_model("llama", dtype=dtype, max_position_embeddings=4096).to(device)
        self.folder = tempfile.TemporaryDirectory()
        self.kept = self.cache()

    def say(self, cache, tokens, batch=1):
        return forward(self.model, prompt(tokens, batch).to(self.device), cache)

    def cache(self, **options):
        cache = selfindex.SelfIndexCache(
            self.model, **({"budget": 0.3, "dense_below": 0, "min_tokens": 1} | options)
        )
        self.say(cache, TOKENS)
        return cache

    def prompt(self):
        self.cache()

    def prompt_of_the_paper_preset(self):
        self.cache(preset="paper", value_bits=2)

    def prompt_of_an_offloaded_cache(self):
        self.cache(offloading=True)

    def prompt_with_padding(self):
        mask = torch.ones(2, TOKENS, dtype=torch.long)
        mask[0, :37] = 0
        cache = selfindex.SelfIndexCache(self.model)
        forward(self.model, prompt(TOKENS, 2).to(self.device), cache, mask.to(self.device))

    def steps(self):
        cache = self.cache()
        for _ in range(40):
            self.say(cache, 1)

    def chunks(self):
        cache = self.cache()
        for _ in range(2):
            self.say(cache, 50)

    def loop(self, **options):
        cache = self.cache(**options)
        cache.replay.emulate = True
        for _ in range(40):
            self.say(cache, 1)

    def loop_of_an_offloaded_cache(self):
        self.loop(offloading=True)

    def generate(self):
        ids = prompt(TOKENS).to(self.device)
        generate(self.model, ids, selfindex.SelfIndexCache(self.model), max_new_tokens=10)

    def rows(self):
        cache = self.cache()
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0, 1], device=self.device))
        cache.batch_select_indices(torch.tensor([0, 2], device=self.device))
        self.say(cache, 1, batch=2)

    def crop(self):
        cache = self.cache()
        cache.crop(-100)
        self.say(cache, 1)

    def fork(self):
        self.say(self.kept.fork(), 200)  # pages of its own in a pool that lives on

    def deep_copy(self):
        self.say(copy.deepcopy(self.kept), 1)

    def save_and_load(self):
        path = Path(self.folder.name) / "cache"
        self.kept.save(self.model, path)
        self.say(selfindex.SelfIndexCache.load(self.model, path), 1)

    def refused(self):
        with contextlib.suppress(selfindex.InputError):
            self.say(self.kept.fork(), 1, batch=3)
        with contextlib.suppress(selfindex.StateError):
            self.kept.fork().crop(-10 * TOKENS)

    def reset(self):
        cache = self.cache()
        cache.reset()
        self.say(cache, TOKENS)


NAMES = [name for name in vars(Uses) if name not in ("say", "cache") and not name.startswith("_")]


class _Malloc(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def memory(device="cpu"):
    """What is in use now, once the collector has run.

    Returns:
        Bytes: `malloc`, what the C library has handed out (None before glibc 2.33); `resident`, the
        process's anonymous memory; `cuda`, tensors on the GPU. And `objects` of Python.
    """
    gc.collect()
    libc, found = ctypes.CDLL(None), {"malloc": None}
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what the C library keeps for later is no growth of ours
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = _Malloc
        info = libc.mallinfo2()
        found["malloc"] = info.uordblks + info.hblkhd
    status = Path("/proc/self/status").read_text().splitlines()
    found["resident"] = next(int(x.split()[1]) * 1024 for x in status if x.startswith("RssAnon"))
    if device != "cpu":
        torch.cuda.synchronize()
        found["cuda"] = torch.cuda.memory_allocated()
    return found | {"objects": len(gc.get_objects())}


def growth(use, repeat, warm_up=5, device="cpu"):
    """What one of `repeat` repetitions adds to `memory` on average, after `warm_up` ones that fill caches."""
    for _ in range(warm_up):
        use()
    before = memory(device)
    for _ in range(repeat):
        use()
    after = memory(device)
    return {name: (after[name] - n) / repeat for name, n in before.items() if n is not None}
