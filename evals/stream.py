"""Does quality drift when almost everything is written to the cache during decoding?

A short prompt, then a long text fed a few tokens at a time, as decoding or speculative decoding
would: pages are encoded as they leave the recent window, statistics come from the first page.
The text is a real one, or with --generated what the dense model samples after the prompt.
Per stretch of the text: KL to the dense model, top-1 agreement, and the entropy of the dense model's
distribution.

    python -m evals.stream --texts manual kjv --prompt 200 --tokens 4000
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

import selfindex
from selfindex.config import BARE_SHARE
from selfindex.evaluation.fidelity import compare, continue_from
from selfindex.evaluation.stats import bootstrap
from selfindex.evaluation.texts import load_text

from .environment import arguments, save
from .models import load_model


def stream(model: Any, cache: Any, ids: Tensor, prompt: int, step: int) -> Tensor:
    """Log-probabilities [tokens, vocabulary] after every token of ids [1, n] past the prompt."""
    continue_from(model, cache, ids[:, :prompt], logits_to_keep=1)
    return torch.cat([continue_from(model, cache, part).cpu() for part in ids[:, prompt:].split(step, 1)])


@torch.inference_mode()
def sample(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The prompt [1, n] and what the model samples after it, without an end."""
    torch.manual_seed(0)
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
    )  # fmt: skip


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = arguments(__doc__, texts=("manual", "kjv"))
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--generated", action="store_true", help="go on with text the dense model samples")
    parser.add_argument("--step", type=int, default=8, help="tokens fed at a time")
    parser.add_argument("--stretch", type=int, default=500, help="tokens averaged in a row of the table")
    parser.add_argument("--start", type=int, default=20000, help="first character of the text to use")
    parser.add_argument("--budget", type=float, default=0.05)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.device)
    runs, ratios = [], []
    for text in args.texts:
        content = load_text(text)[args.start : args.start + 12 * (args.prompt + args.tokens)]
        ids = tokenizer(content, return_tensors="pt", add_special_tokens=False).input_ids
        ids = ids[:, : args.prompt + args.tokens].to(args.device)
        if args.generated:
            ids = sample(model, ids[:, : args.prompt], args.tokens)
        dense = stream(model, DynamicCache(config=model.config), ids, args.prompt, args.step)
        cache = selfindex.SelfIndexCache(model, budget=args.budget, sparse_queries=args.step, **BARE_SHARE)
        ours = stream(model, cache, ids, args.prompt, args.step)
        targets = torch.cat((ids[0, args.prompt + 1 :], ids[0, -1:])).cpu()
        parts = [
            compare(d, o, t)
            for d, o, t in zip(dense.split(250), ours.split(250), targets.split(250), strict=True)
        ]
        runs.append({key: np.concatenate([part[key] for part in parts]) for key in ("kl", "top1")})
        runs[-1]["entropy"] = -(dense.exp() * dense).sum(-1).double().numpy()
        ratios.append(cache.report(missed=False).ratio)
        print(f"{text}: {ratios[-1]:.2f} times smaller than 16 bit at the end", flush=True)
    rows = []
    for first in range(0, args.tokens, args.stretch):
        part = slice(first, first + args.stretch)
        row = {key: bootstrap([run[key][part] for run in runs]) for key in runs[0]}
        rows.append({"from": args.prompt + first, "to": args.prompt + first + args.stretch} | row)
        print(rows[-1], flush=True)
    result = {
        "model": args.model,
        "texts": [Path(t).stem for t in args.texts],
        "prompt": args.prompt,
        "generated": args.generated,
        "step": args.step,
        "budget": args.budget,
        "ratio": ratios,
        "rows": rows,
    }
    save(args.output, "stream", result)


if __name__ == "__main__":
    main()
