"""`vllm serve` in a process of its own, its metrics, and the steps that its scheduler made."""

import json
import os
import time
from pathlib import Path

from serving.engines import DEVICE, STEPS_FILE

from evals import server

TESTS = Path(__file__).resolve().parents[1]


class Server(server.Server):
    """A server with the cache, on a free port of this machine; a context manager.

    Args:
        folder: the model, with its tokenizer.
        work: a folder for its log, its steps, and the balance of keys that it measures.
        selfindex: options of the cache.
        options: further options of `vllm serve`, underscores for dashes.
    """

    def __init__(self, folder, work, selfindex, **options):
        self.record, self.cache = work / "steps.jsonl", work / "selfindex"
        options = {
            "attention_backend": "CUSTOM",
            "disable_access_log_for_endpoints": "/health,/metrics",
            "additional_config": {"selfindex": selfindex},
            "scheduler_cls": "serving.recording.Recording",
            "enforce_eager": True,
        } | options
        if DEVICE == "cuda":
            options = {"gpu_memory_utilization": 0.1} | options
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
            "SELFINDEX_CACHE": str(self.cache),
            STEPS_FILE: str(self.record),
        }
        super().__init__(folder, work / "server.log", environment, **options)
        self.environment.pop("SELFINDEX_CPU", None)

    def __enter__(self):
        self.record.touch()
        return super().__enter__()

    def wait(self, reached, otherwise, seconds=120):
        """Wait until `reached()`; the error says `otherwise`."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end, otherwise
            time.sleep(0.05)

    def idle(self):
        """Wait until no request is left and none holds a block."""
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            self.wait(lambda name=name: self.metric(name) == 0, f"{name} stays at {self.metric(name)}")

    def steps(self):
        """(request, tokens computed before, new tokens) of every row of every step; prompts by request."""
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        asked = {name: ids for line in lines for name, ids in line["asked"].items()}
        return [[tuple(row) for row in line["rows"]] for line in lines], asked
