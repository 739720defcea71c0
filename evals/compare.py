"""This cache beside others, at equal token budgets: fidelity to the dense model, and needles.

The measurements of `evals.fidelity` for the methods of `selfindex.evaluation`, and a needle task
scored without decoding: the question and the right answer are fed as one chunk, and a needle is found if
every token of the answer is the most likely one, which is when greedy decoding gives it.

    python -m evals.compare --texts manual stdlib kjv --lengths 4096 8064 --output compare.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfindex.cli.needle import FACT, build_task
from selfindex.evaluation.fidelity import compare, continue_from, summarise
from selfindex.evaluation.methods import head_dim, methods, own_bytes
from selfindex.evaluation.recording import record
from selfindex.evaluation.texts import load_text

from .environment import describe, show_table
from .models import load_model


@torch.inference_mode()
def answer_margin(model: Any, tokenizer: Any, cache: Any, question: Tensor, answer: str) -> float:
    """Least log-probability lead of the answer's tokens over all others."""
    words = FACT.split("{}")[0] + answer + FACT.split("{}")[1]
    target = tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids.to(question.device)
    logits = model(torch.cat((question, target), 1), past_key_values=cache).logits[0]
    scores = logits[-target.shape[1] - 1 : -1].float().log_softmax(-1)
    right = scores.gather(1, target[0, :, None])[:, 0].clone()
    best_other = scores.scatter(1, target[0, :, None], -torch.inf).amax(-1)
    return float((right - best_other).min())


def fidelity(model: Any, tokenizer: Any, args: argparse.Namespace, chosen: dict[str, Any]) -> dict[str, Any]:
    """Table of `evals.fidelity` per length."""
    lengths: dict[str, Any] = {}
    for length in args.lengths:
        runs = []
        for text in args.texts:
            content = load_text(text)[args.start : args.start + 12 * length]
            ids = tokenizer(content, return_tensors="pt", add_special_tokens=False).input_ids[:, : length + 1]
            ids = ids.to(args.device)
            prefix = length - args.continuation
            recording = record(model, ids[:, :prefix])
            fed, targets = ids[:, prefix:length], ids[0, prefix + 1 :]
            dense = continue_from(model, recording.dense_copy(), fed)
            run: dict[str, dict[str, Any]] = {}
            for name, (make, size, read) in chosen.items():
                cache = make(model, recording)
                if size is None:
                    size, read = own_bytes(cache)
                run[name] = compare(dense, continue_from(model, cache, fed), targets)
                run[name] |= {"bytes": size, "read": read}
                print(f"{length} {text} {name}: KL {run[name]['kl'].mean():.4f}", flush=True)
            runs.append(run)
        table = summarise(runs)
        for name, row in table.items():
            row["read"] = runs[0][name]["read"]
        lengths[str(length)] = table
        show_table(f"{args.model}, {length} tokens, {len(args.texts)} texts", table)
    return lengths


def needles(model: Any, tokenizer: Any, args: argparse.Namespace, chosen: dict[str, Any]) -> dict[str, Any]:
    """Needles found, of those that the dense cache finds."""
    margins: dict[str, list[float]] = {name: [] for name in chosen}
    for text in args.texts:
        content = load_text(text)
        for i in range(args.needles):
            depth = (i + 0.5) / args.needles
            task = build_task(tokenizer, content, args.needle_length, depth, seed=i, more=1)
            recording = record(model, task.document.to(args.device))
            question = task.question_ids.to(args.device)
            for name, (make, *_) in chosen.items():
                cache = make(model, recording)
                margins[name].append(answer_margin(model, tokenizer, cache, question, task.answer))
            print(f"needle {text} {i}: dense {margins['dense'][-1]:.2f}", flush=True)
    known = torch.tensor(margins["dense"]) > 0
    found: dict[str, Any] = {
        "asked": len(known),
        "dense finds": int(known.sum()),
        "length": args.needle_length,
    }
    for name, values in margins.items():
        hits = (torch.tensor(values) > 0)[known]
        found[name] = {"found": int(hits.sum())}
        print(f"{name:40} {int(hits.sum())} of {int(known.sum())}")
    return found


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, gemma3-270m, or a model path")
    parser.add_argument("--texts", nargs="+", default=["manual", "stdlib", "kjv"])
    parser.add_argument("--lengths", nargs="*", type=int, default=[4096], help="context incl. continuation")
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--start", type=int, default=20000, help="first character of the text to use")
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--needles", type=int, default=0, help="needles per text")
    parser.add_argument("--needle-length", type=int, default=4096)
    parser.add_argument("--only", nargs="*", help="run only methods whose name starts with one of these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    model.to(args.device)
    chosen = methods(args.budget, head_dim(model))
    if args.only:
        wanted = ("dense", *args.only)
        chosen = {name: made for name, made in chosen.items() if name.startswith(wanted)}
    report = {
        "environment": describe("compare"),
        "model": args.model,
        "budget": args.budget,
        "head_dim": head_dim(model),
        "texts": [Path(t).stem for t in args.texts],
        "lengths": fidelity(model, tokenizer, args, chosen),
        "needles": needles(model, tokenizer, args, chosen) if args.needles else None,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
