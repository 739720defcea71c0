"""Tasks through an OpenAI-compatible server of vLLM, beside the library on the same samples.

    python -m evals.served MODEL --out OUT --library --tasks niah_single_2 vt --lengths 4096 16384
        --samples 25 --caches selfindex bf16 fp8 --output evals/results/served-NAME.json

For each cache a server is started on MODEL (a folder), or with --url one that runs already is asked, as the
one cache named by --caches. Samples, prompts and judges are those of `selfindex eval`; prompts go as token
ids. Each document is sent first, and then again with its question behind it, so that the question reads it
from pages that prefix caching found, as the library reads a document before it knows the question; --whole
sends both at once, and a prompt of one chunk is then read exactly. Served options are those of the
evaluation: the budget without a floor, selection from the first page on.

--library first has `selfindex eval` answer the same samples, dense and with its default policy; --records
FILE takes its records.jsonl of an earlier run. Answers are kept in OUT/served.jsonl: the same command goes
on from there. Brackets are 95 % intervals: Wilson's over samples, the bootstrap's for differences, sample
by sample.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from selfindex.config import BARE_SHARE
from selfindex.evaluation.records import Records
from selfindex.evaluation.stats import bootstrap, mean, mean_of_means, wilson
from selfindex.evaluation.tasks import GROUPS, TASKS, Sample, Source
from selfindex.evaluation.texts import load_text

from .environment import describe
from .server import CACHES, Server

NEEDLES = tuple(name for name in GROUPS["ruler"] if name.startswith("niah"))
START = 600
"""Seconds that a server may take to start."""
Key = tuple[str, int, int]
"""Task, length, sample."""


def main() -> None:
    """Ask, compare, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="folder of a model with its tokenizer")
    parser.add_argument("--out", type=Path, default=Path("served"), help="folder of records and logs")
    parser.add_argument("--url", help="a server that runs, as http://127.0.0.1:8000")
    parser.add_argument("--caches", nargs="+", default=["selfindex", "bf16"], choices=list(CACHES))
    parser.add_argument("--tasks", nargs="+", default=list(NEEDLES), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096])
    parser.add_argument("--samples", type=int, default=25, help="a task and length")
    parser.add_argument("--texts", nargs="+", default=["manual", "stdlib"], help="or UTF-8 files")
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--records", type=Path, help="of `selfindex eval` on the same model and texts")
    parser.add_argument("--library", action="store_true", help="run `selfindex eval` first")
    parser.add_argument("--minutes", type=float, default=0, help="for --library at most; 0: no limit")
    parser.add_argument("--whole", action="store_true", help="documents are not sent ahead")
    parser.add_argument("--at-once", type=int, default=8, help="requests")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--memory", type=float, help="share of the GPU's memory for the server")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.url and len(args.caches) != 1:
        parser.error("with --url, name with --caches the one cache that the server has")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.library:
        library(args)
        args.records = args.out / "library" / "records.jsonl"
    known = load_records(args)
    samples = dict(make_samples(args))
    records = Records(args.out / "served.jsonl", settings(args))
    for cache in args.caches:
        todo = [key for key in samples if not records.has(**named(key, cache))]
        if not todo:
            continue
        if args.url:
            ask_all(args.url, cache, {key: samples[key] for key in todo}, records, args)
        else:
            with Server(
                args.model, args.out / f"{cache}.log", start_s=START, **served(cache, args)
            ) as server:
                ask_all(server.url, cache, {key: samples[key] for key in todo}, records, args)
    answers = {f"served {cache}": rows_of(records, cache, samples) for cache in args.caches} | known
    found = compare(answers, samples, args)
    show(found)
    if args.output is not None:
        result = {"environment": describe("served"), "settings": settings(args), "samples": args.samples}
        args.output.write_text(json.dumps(result | {"found": found}, indent=1) + "\n")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all answers have in common."""
    return {
        "model": Path(args.model).name,
        "texts": [Path(name).stem for name in args.texts],
        "budget": args.budget,
        "preset": args.preset,
        "dtype": args.dtype,
        "whole": args.whole,
    }


def ours(args: argparse.Namespace) -> str:
    """What the library's evaluation calls its default policy."""
    return f"selfindex {args.preset} {100 * args.budget:g} %"


def library(args: argparse.Namespace) -> None:
    """Have the library answer the same samples."""
    listed = {"tasks": args.tasks, "lengths": args.lengths}
    options = [word for name, value in listed.items() for word in (f"--{name}", ",".join(map(str, value)))]
    options += [word for text in args.texts for word in ("--text", text)]
    options += ["--samples", str(args.samples), "--policy", "default", "--budget", str(args.budget)]
    options += ["--method", ours(args), "--device", args.device, "--dtype", args.dtype]
    options += ["--minutes", str(args.minutes), "--output", str(args.out / "library")]
    command = [sys.executable, "-m", "selfindex", "eval", args.model, "--suite", "long", "--part", "tasks"]
    subprocess.run([*command, *options], check=True)


def load_records(args: argparse.Namespace) -> dict[str, dict[Key, dict[str, Any]]]:
    """The library's answers, dense and by default, by method; they must be of the same samples."""
    if args.records is None:
        return {}
    first, *rows = [json.loads(line) for line in args.records.read_text().splitlines()]
    wanted = settings(args)
    for name in ("model", "texts", "budget"):
        if first["settings"][name] != wanted[name]:
            sys.exit(f"{args.records} has {name} {first['settings'][name]}, asked for is {wanted[name]}")
    return {
        shown: {
            (row["name"], row["length"], row["sample"]): row
            for row in rows
            if row["part"] == "tasks" and row["method"] == method and "score" in row
        }
        for shown, method in (("library selfindex", ours(args)), ("library dense", "dense"))
    }


def make_samples(args: argparse.Namespace) -> Iterator[tuple[Key, Sample]]:
    """The samples of `selfindex eval`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sources = [Source(tokenizer, load_text(text)) for text in args.texts]
    for length in args.lengths:
        for task in args.tasks:
            for i in range(args.samples):
                sample = TASKS[task](sources[i % len(sources)], length, i)
                if sample.later:
                    sys.exit(f"the task {task} has several turns, which are not asked through a server")
                yield (task, length, i), sample


def served(cache: str, args: argparse.Namespace) -> dict[str, Any]:
    """Options of the server of a cache."""
    chosen = dict(CACHES[cache])
    if "additional_config" in chosen:
        fair = BARE_SHARE | {"budget": args.budget, "preset": args.preset}
        chosen["additional_config"] = {"selfindex": fair}
    plain = {"enforce_eager": True} if args.eager else {}
    graphs = {"mode": 0} if args.eager else {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    memory = {} if args.memory is None else {"gpu_memory_utilization": args.memory}
    sizes = {"max_model_len": max(args.lengths) + 64, "max_num_seqs": max(args.at_once, 2)}
    return {
        "dtype": args.dtype,
        "compilation_config": graphs,
        "seed": 0,
        **sizes,
        **memory,
        **plain,
        **chosen,
    }


def named(key: Key, cache: str) -> dict[str, Any]:
    """Fields that tell an answer from others."""
    task, length, i = key
    return {"part": "served", "name": task, "length": length, "sample": i, "method": cache}


def ask_all(
    url: str, cache: str, samples: dict[Key, Sample], records: Records, args: argparse.Namespace
) -> None:
    """Ask, some requests at once, and record what the judges say."""
    with ThreadPoolExecutor(args.at_once) as pool:
        replies = pool.map(partial(ask, url, whole=args.whole), samples.values())
        for (key, sample), reply in zip(samples.items(), replies, strict=True):
            scores = sample.scores([reply])
            records.add(**named(key, cache), **scores, reply=reply, answers=sample.answers)


def ask(url: str, sample: Sample, whole: bool) -> str:
    """The greedy reply of a server to a sample."""
    if not whole:
        complete(url, sample.document, 1)
    return complete(url, sample.document + sample.question, sample.new_tokens)


def complete(url: str, prompt: list[int], tokens: int) -> str:
    """The text that a server generates behind token ids."""
    asked = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
    request = urllib.request.Request(
        f"{url.rstrip('/')}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        sys.exit(f"the server refuses a prompt of {len(prompt)} tokens: {error.read().decode()[:500]}")
    return text


def rows_of(records: Records, cache: str, samples: dict[Key, Sample]) -> dict[Key, dict[str, Any]]:
    """A cache's answers to the samples."""
    found = {(row["name"], row["length"], row["sample"]): row for row in records.of("served")
             if row["method"] == cache}  # fmt: skip
    return {key: found[key] for key in samples}


def compare(
    answers: dict[str, dict[Key, dict[str, Any]]], samples: dict[Key, Sample], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each task and length, and one for the mean over tasks of each length.

    Returns:
        Rows of "scores", [mean, low, high] by method; and, where both answered all the same samples,
        "difference" of the served cache from the library's, likewise, and the share of "equal" replies:
        those that begin with all that the library said.
    """
    found = []
    for length in args.lengths:
        by_task: list[list[Key]] = [
            [key for key in samples if key[:2] == (task, length)] for task in args.tasks
        ]
        for task, keys in zip(args.tasks, by_task, strict=True):
            found.append({"task": task, "length": length} | cells(answers, [keys], wilson_of))
        if len(by_task) > 1:
            found.append({"task": "mean", "length": length} | cells(answers, by_task, mean_of_means))
    return found


def wilson_of(groups: list[Any]) -> list[float]:
    """Of one task."""
    return wilson(groups[0])


def cells(
    answers: dict[str, dict[Key, dict[str, Any]]],
    groups: list[list[Key]],
    interval: Callable[[list[Any]], list[float]],
) -> dict[str, Any]:
    """Scores, difference and equal replies over groups of samples; see `compare`."""

    def scores(method: str) -> list[Any]:
        return [np.array([answers[method][key]["score"] for key in keys]) for keys in groups]

    there = [
        method for method, rows in answers.items() if all(key in rows for keys in groups for key in keys)
    ]
    found: dict[str, Any] = {"scores": {method: interval(scores(method)) for method in there}}
    pair = "served selfindex", "library selfindex"
    if all(method in there for method in pair):
        both = [scores(method) for method in pair]
        less = [a - b for a, b in zip(*both, strict=True)]
        found["difference"] = bootstrap(less, mean, block=1) if len(less) == 1 else mean_of_means(less)
        # The library stops reading a reply as soon as its judge has seen enough.
        replies = [
            [answers[method][key]["reply"].strip() for method in pair] for keys in groups for key in keys
        ]
        same = [here.startswith(there) for here, there in replies]
        found["equal"] = round(sum(same) / len(same), 4)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    methods = list(dict.fromkeys(method for row in rows for method in row["scores"]))
    widths = [max(len(method), 18) for method in methods]
    title = [f"{method:>{width}}" for method, width in zip(methods, widths, strict=True)]
    print(f"{'task':16} {'length':>6} {' '.join(title)} {'served - library':>20} equal")
    for row in rows:
        shown = [f"{bracket(row['scores'].get(method)):>{width}}"
                 for method, width in zip(methods, widths, strict=True)]  # fmt: skip
        less, equal = bracket(row.get("difference")), f"{row['equal']:.2f}" if "equal" in row else ""
        print(f"{row['task']:16} {row['length']:6} {' '.join(shown)} {less:>20} {equal:>5}")


def bracket(values: list[float] | None) -> str:
    """`estimate [low, high]`."""
    return "" if values is None else f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


if __name__ == "__main__":
    main()
