"""Does quality drift over the turns of a chat?

In every turn the user gives a passage of a text and asks about it, and the dense model answers
greedily. The compressed cache reads the same turns: questions as one chunk that attends to all
that is stored, as it does in use; of the reply every token selects for itself. Per turn, over the
reply's tokens: KL to the dense model and top-1 agreement.

    python -m evals.chat --texts manual kjv --turns 10
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import selfindex
from selfindex.config import BARE_SHARE
from selfindex.evaluation.fidelity import compare, continue_from
from selfindex.evaluation.greedy import end_tokens, greedy
from selfindex.evaluation.stats import Array, bootstrap
from selfindex.evaluation.texts import load_text

from .environment import arguments, save
from .models import load_model

QUESTION = "What is this passage about, and how does it differ from the passages before?"


def answer(model: Any, cache: Any, ids: torch.Tensor, most: int) -> list[int]:
    """Greedy reply to ids [1, T] over a cache, up to the end of the turn."""
    ends, reply = end_tokens(model), list[int]()
    for following in islice(greedy(model, cache, ids), most):
        token = int(following)
        if token in ends and reply:
            break
        reply.append(token)
    return reply


def chat(model: Any, tokenizer: Any, text: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Per turn: cached tokens at its end, and the metrics of its reply's tokens."""
    dense = DynamicCache(config=model.config)
    ours = selfindex.SelfIndexCache(model, budget=args.budget, sparse_queries=args.reply, **BARE_SHARE)
    messages: list[dict[str, str]] = []
    before, closing, turns = "", "", []
    left: list[int] = []  # the last token of a reply, which no cache has seen yet
    for turn in range(args.turns):
        at = args.start + turn * args.passage
        passage = text[at : at + args.passage].strip()
        messages.append({"role": "user", "content": f"{passage}\n\n{QUESTION}"})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(closing + rendered[len(before) :], add_special_tokens=False).input_ids
        new = torch.tensor([left + ids], device=args.device)
        past = dense.get_seq_length()
        reply = answer(model, dense, new, args.reply)
        # The reply again as one chunk: what both caches predict for its tokens.
        dense.crop(past + new.shape[1] - 1 - dense.get_seq_length())
        fed = torch.cat((new[:, -1:], torch.tensor([reply[:-1]], device=new.device, dtype=new.dtype)), 1)
        continue_from(model, ours, new[:, :-1])
        targets = torch.tensor(reply, device=new.device)
        found = compare(continue_from(model, dense, fed), continue_from(model, ours, fed), targets)
        turns.append({"tokens": dense.get_seq_length(), "ratio": ours.report(missed=False).ratio} | found)
        words = tokenizer.decode(reply, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": words})
        before = tokenizer.apply_chat_template(messages, tokenize=False)
        if not before.startswith(rendered + words):
            raise ValueError("the model's chat template rewrites earlier turns")
        closing, left = before[len(rendered) + len(words) :], reply[-1:]
    return turns


def main() -> None:
    """Parse the command line, run, print and write the JSON."""
    parser = arguments(__doc__, texts=("manual", "kjv"))
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--passage", type=int, default=1500, help="characters of the text in a turn")
    parser.add_argument("--reply", type=int, default=64, help="tokens of a reply at most")
    parser.add_argument("--start", type=int, default=20000, help="first character of the text to use")
    parser.add_argument("--budget", type=float, default=0.05)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.device)
    chats = [chat(model, tokenizer, load_text(text), args) for text in args.texts]
    rows = []
    for turn in range(args.turns):
        here: list[dict[str, Any]] = [turns[turn] for turns in chats]
        parts: dict[str, list[Array]] = {key: [t[key] for t in here] for key in ("kl", "top1")}
        row = {key: bootstrap(values) for key, values in parts.items()}
        rows.append({"turn": turn + 1, "tokens": max(t["tokens"] for t in here)} | row)
        print(rows[-1], flush=True)
    result = {
        "model": args.model,
        "texts": [Path(t).stem for t in args.texts],
        "budget": args.budget,
        "ratio": [turns[-1]["ratio"] for turns in chats],
        "rows": rows,
    }
    save(args.output, "chat", result)


if __name__ == "__main__":
    main()
