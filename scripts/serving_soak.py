"""Random load on an engine of vLLM, watched for errors, answers that depend on others, and growing memory.

    python scripts/serving_soak.py --seconds 600

Runs where `make test-serving` does, or on a GPU with vllm. In waves, requests come at random: prompts of
very different lengths, prefixes that several share, several answers, stop strings, sampling. Some are
aborted, and there are too few blocks for all. Rounds with and without drafts take turns, each with an engine
of its own. After a wave no request and no block may be left, and every k-th plain request that finished is
asked again alone. If it takes the same steps then, its tokens have to be the same. A preempted one takes
others, and so does one whose prompt was cut because others came before it: its tokens have to be those
of the policy in PyTorch (tests/serving/policy.py) by the steps that it took. So have those of a group of
requests with a shared prefix. The policy knows no rejected drafts: with them, only equal steps are compared.

A batch of another size is rounded otherwise, which now and then selects another of nearly equal tokens:
all but a few in a thousand tokens have to be the policy's. Memory grows until the libraries below
PyTorch have met most batch sizes: it is given after the first, the middle and the last wave of each round,
and what it grew by from the middle on.

The last line printed is JSON. Exits with 1 after any error.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import torch
from serving.engines import DEVICE, make_writer, prompts, serving
from serving.policy import CLOSE, MOST_EQUAL, agreement
from uses import memory

from selfindex.config import SelfIndexConfig
from selfindex.evaluation.environment import command_line, describe

OPTIONS = {"budget": 48, "dense_below": 128}
DRAFTER = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
MOST_DIFFERENT = 0.02 if DEVICE == "cpu" else 0.3
"""Share of answers that may differ from those alone: one token that is rounded otherwise will do."""
VOCAB, LONGEST, MOST = 256, 700, 24
"""Token ids of prompts, their tokens, and requests at a time."""


@dataclass
class Asked:
    """A request: what was asked, and the tokens of its answers so far."""

    prompt: list[int]
    options: dict[str, Any]
    salt: str
    kind: str
    tokens: dict[int, list[int]] = field(default_factory=dict)
    done: bool = False


class Load:
    """Waves of requests to one engine.

    Args:
        recorded: the engine, tests/serving/engines.py.
        model: the same model in transformers.
        every: of how many finished requests one is asked again.
        drafts: whether the engine drafts.
        counts: what happened, added to.
    """

    def __init__(
        self, recorded: Any, model: Any, draw: random.Random, every: int, drafts: bool, counts: Any
    ) -> None:
        self.recorded, self.model, self.draw = recorded, model, draw
        self.every, self.drafts, self.counts = every, drafts, counts
        self.engine = recorded.engine.llm_engine
        self.requests: dict[str, Asked] = {}
        self.number = self.comparable = self.waves = 0

    def wave(self, seconds: float) -> None:
        """Ask for a time, finish, and check."""
        self.waves += 1
        groups = [prompts(n, seed=self.draw.random(), vocab=VOCAB)[0] for n in (130, 200, 300, 390, 520, 600)]
        end = time.monotonic() + seconds
        running: set[str] = set()
        while running or time.monotonic() < end:
            if time.monotonic() < end and len(running) < MOST and self.draw.random() < 0.5:
                running.add(self.ask(groups))
            if running and self.draw.random() < 0.01:
                name = self.draw.choice(sorted(running))
                self.engine.abort_request([name])
                running.remove(name)
                self.counts["aborted"] += 1
            running -= self.step()
        assert not self.engine.has_unfinished_requests(), "requests are left"
        self.accounts()
        self.compare()
        self.accounts()
        self.requests.clear()
        self.recorded.forget()

    def ask(self, groups: list[list[int]]) -> str:
        """Send a random request; its name."""
        self.number += 1
        name, new = f"r{self.number}", self.draw.randint(1, 64)
        length = self.draw.choice((self.draw.randint(1, 130), self.draw.randint(130, LONGEST)))
        (prompt,), salt = prompts(length, seed=self.draw.random(), vocab=VOCAB), name
        kind = self.draw.choice(("plain", "plain", "plain", "shared", "shared", "several", "stop", "sampled"))
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True}
        if self.drafts and kind == "plain":  # something that repeats
            prompt = (prompt[:9] * LONGEST)[:length]
        if kind == "shared":
            group = self.draw.randrange(len(groups))
            prompt, salt = (
                groups[group] + prompt[: LONGEST - len(groups[group])],
                f"wave {self.waves}, group {group}",
            )
        elif kind == "several":
            options |= {"n": self.draw.randint(2, 3), "temperature": 1.0}
        elif kind == "stop":
            options |= {"stop": [self.draw.choice("abcdefghijklm")]}
        elif kind == "sampled":
            options |= {"temperature": 1.0, "top_p": 0.9}
        self.requests[name] = Asked(prompt, options, salt, kind)
        self.send(name, self.requests[name])
        self.counts[kind] += 1
        return name

    def send(self, name: str, asked: Asked) -> None:
        """Give a request to the engine."""
        from vllm import SamplingParams

        prompt = {"prompt_token_ids": asked.prompt, "cache_salt": asked.salt}
        self.engine.add_request(name, prompt, SamplingParams(**asked.options))

    def step(self) -> set[str]:
        """One step of the engine; requests that ended."""
        ended = set()
        for output in self.engine.step():
            asked = self.requests[output.request_id]
            for one in output.outputs:
                asked.tokens[one.index] = list(one.token_ids)
                if output.finished and asked.kind == "stop" and one.finish_reason == "stop":
                    assert asked.options["stop"][0] not in one.text, "a stop string was passed"
                    self.counts["stopped"] += 1
            if output.finished:
                asked.done = True
                ended.add(output.request_id)
                self.finished(asked)
        return ended

    def finished(self, asked: Asked) -> None:
        """Count a finished request and its tokens."""
        lengths = [len(tokens) for tokens in asked.tokens.values()]
        assert len(lengths) == asked.options.get("n", 1), "an answer is missing"
        wanted = asked.options["max_tokens"]
        assert all(n == wanted or (asked.kind == "stop" and n < wanted) for n in lengths), (
            "its length is wrong"
        )
        self.counts["finished"] += 1
        self.counts["prompt tokens"] += len(asked.prompt)
        self.counts["new tokens"] += sum(lengths)

    def accounts(self) -> None:
        """With no request in flight, nothing may be held."""
        assert self.recorded.used_blocks() == 0, f"{self.recorded.used_blocks()} blocks are held"
        assert not self.recorded.held(), f"requests are remembered: {sorted(self.recorded.held())[:5]}"

    def named(self, name: str) -> str:
        """A request's name here; the engine adds something to it."""
        return name if name in self.requests else name.rsplit("-", 1)[0]

    def rows(self) -> dict[str, list[tuple[int, int]]]:
        """Tokens computed before and new ones of the steps of every request, by its name here."""
        found = collections.defaultdict(list)
        for name, computed, new in (row for step in self.recorded.steps for row in step):
            found[self.named(name)].append((computed, new))
        return found

    def compare(self) -> None:
        """Ask every k-th plain request again, alone, and compare; and a group that shared a prefix."""
        before, chosen = self.rows(), []
        for name, asked in self.requests.items():
            if asked.kind == "plain" and asked.done:
                self.comparable += 1
                preempted = any(a[0] > b[0] for a, b in zip(before[name], before[name][1:], strict=False))
                self.counts["preempted plain"] += preempted
                if self.comparable % self.every == 0:
                    chosen.append(name)
        salts = sorted({asked.salt for asked in self.requests.values() if asked.kind == "shared"})
        shared = self.draw.choice(salts) if salts else None
        if not self.drafts and shared is not None:
            group = [name for name, asked in self.requests.items() if asked.salt == shared]
            self.counts["groups compared with the policy"] += self.by_policy(group)
        for name in chosen:
            asked = self.requests[name]
            again = f"again {name}"
            self.requests[again] = Asked(asked.prompt, asked.options, again, "again")
            self.send(again, self.requests[again])
            while again not in self.step():
                pass
            if self.rows()[again] == before[name]:
                self.counts["compared alone"] += 1
                if self.requests[again].tokens != asked.tokens:
                    self.counts["differ alone"] += 1
                    for either in () if self.drafts else (name, again):
                        self.by_policy([either])
            elif self.drafts:
                self.counts["other steps with drafts, not compared"] += 1
            else:
                self.counts["compared with the policy"] += self.by_policy([name])

    def by_policy(self, names: list[str]) -> int:
        """Compare requests that may share pages with the policy."""
        steps = [[(self.named(name), *row) for name, *row in step] for step in self.recorded.steps]
        steps = [[row for row in step if row[0] in names] for step in steps]
        prompts = {name: self.requests[name].prompt for name in names}
        tokens = {name: self.requests[name].tokens.get(0, []) for name in names}
        if not any(tokens.values()):
            return 0
        config = SelfIndexConfig(**OPTIONS)
        same, total = agreement(self.model, config, self.recorded.constants(), prompts, steps, tokens)
        self.counts["policy's tokens"] += same
        self.counts["tokens compared with the policy"] += total
        assert same >= CLOSE * total, f"{names}: {same} of {total} tokens are the policy's; {steps}"
        return 1


def main() -> int:
    """Run rounds, print a line of JSON; 1 after any error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument(
        "--rounds", type=int, default=2, help="engines that take turns; every other one drafts"
    )
    parser.add_argument("--wave", type=float, default=8, help="seconds in which requests come, before checks")
    parser.add_argument("--every", type=int, default=10, help="of how many plain requests one is asked again")
    parser.add_argument("--blocks", type=int, default=150, help="blocks of the engine's cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    errors: list[str] = []
    readings: list[list[Any]] = []
    torch.set_num_threads(1)  # the tensors are small
    start, draw = time.monotonic(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SELFINDEX_CACHE"] = str(Path(folder) / "selfindex")
        model = make_writer(Path(folder) / "model")
        for i in range(args.rounds):
            drafts = {"speculative_config": DRAFTER} if i % 2 else {}
            sizes = {
                "max_num_batched_tokens": 2048,
                "max_num_seqs": 16,
                "num_gpu_blocks_override": args.blocks,
            }
            readings.append([])
            with serving(
                Path(folder) / "model",
                OPTIONS,
                enable_prefix_caching=True,
                skip_tokenizer_init=False,
                **sizes,
                **drafts,
            ) as recorded:
                load = Load(recorded, model, draw, args.every, bool(drafts), counts)
                while time.monotonic() - start < args.seconds * (i + 1) / args.rounds:
                    try:
                        load.wave(args.wave)
                    except Exception as error:
                        traceback.print_exc()
                        errors.append(f"round {i}: {type(error).__name__}: {error}"[:500])
                        break  # what an engine holds after an error says nothing
                    counts["waves"] += 1
                    readings[-1].append(memory(DEVICE))
                    print(f"round {i}: {dict(counts)}, {readings[-1][-1]}", file=sys.stderr, flush=True)
                counts["preemptions"] += int(recorded.metric("num_preemptions"))
                counts["prefix tokens found"] += int(recorded.metric("prefix_cache_hits"))
                counts["draft tokens accepted"] += int(recorded.metric("spec_decode_num_accepted_tokens"))
    if counts["policy's tokens"] < MOST_EQUAL * counts["tokens compared with the policy"]:
        errors.append("too few tokens are the policy's")
    if counts["differ alone"] > max(1, MOST_DIFFERENT * counts["compared alone"]):
        errors.append("too many answers differ alone")
    three = [[some[0], some[len(some) // 2], some[-1]] for some in readings if some]
    growth = [
        {name: value - middle[name] for name, value in last.items() if value is not None}
        for _, middle, last in three
    ]
    seconds = round(time.monotonic() - start)
    found = {"device": DEVICE, "seconds": seconds, **counts, "errors": errors}
    found |= {"memory": three, "growth": growth}
    if args.output is not None:
        command = f"python scripts/serving_soak.py {command_line(*sys.argv[1:])}"
        args.output.write_text(json.dumps({"environment": describe(command), **found}, indent=1) + "\n")
    print(json.dumps(found))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
