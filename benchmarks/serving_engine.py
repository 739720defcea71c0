"""Parts of benchmarks/serving.py that time the steps of an engine in this process."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

STEPS = 64
"""New tokens of a request that is measured alone."""
SETTLE, TIMED = 4, 48
"""Steps after requests were dropped that are not timed, as they were scheduled before, and that are."""
Rows = Iterator[tuple[dict[str, Any], dict[str, Any] | None]]
"""(facts of the engine, one row of a part, or None before the first)."""


def rows_of(part: str, model: str, options: dict[str, Any], arguments: argparse.Namespace) -> Rows:
    """Start one engine and measure."""
    from vllm import LLM

    start = time.perf_counter()
    engine = LLM(
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        model=model,
        **options,
    )
    held = capacity(engine, engine.model_config.max_model_len)
    facts = {"capacity": held, "start_s": time.perf_counter() - start}
    yield facts, None
    if part == "single":
        for length in arguments.lengths:
            yield facts, single(engine, length)
    else:
        for pair in arguments.saturate:
            prompt, steps = map(int, pair.split(":"))
            yield facts, saturated(engine, prompt, steps, arguments)


def capacity(engine: Any, length: int) -> int:
    """Tokens that the cache holds in requests of a length, as the engine counts them."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    config = engine.llm_engine.vllm_config
    core = engine.llm_engine.engine_core.engine_core
    longest = config.model_config.max_model_len
    try:
        config.model_config.max_model_len = length
        return int(get_kv_cache_capacity(config, core.scheduler.kv_cache_config)[0])
    finally:
        config.model_config.max_model_len = longest


class Flight:
    """Requests in flight in an engine, one step at a time.

    Attributes:
        names: of those that were not dropped, in the order in which they were sent.
        begun: those that have a token.
    """

    def __init__(self, engine: Any) -> None:
        self.core, self.scheduler = engine.llm_engine, engine.llm_engine.engine_core.engine_core.scheduler
        self.vocabulary = engine.model_config.get_vocab_size()
        self.names: list[str] = []
        self.begun: set[str] = set()
        self._last = time.perf_counter()

    def send(self, prompt: int, new: int) -> None:
        """A request whose first tokens no other one has; prompts are random."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        number = len(self.names)
        draw = random.Random(f"{time.time_ns()} {number}")
        first = [number // 100, number % 100]
        tokens = first + [draw.randrange(100, self.vocabulary) for _ in range(prompt - 2)]
        greedy = SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        name = f"{time.time_ns()}-{number}"
        self.core.add_request(name, {"prompt_token_ids": tokens}, greedy)
        self.names.append(name)

    def step(self) -> tuple[float, int]:
        """(seconds since the step before, requests that got a token)."""
        outputs = self.core.step()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        for output in outputs:
            if output.request_id not in self.begun:
                assert not output.num_cached_tokens, "tokens were found in a cache of prefixes"
                self.begun.add(output.request_id)
        return seconds, len(outputs)

    def drop(self, keep: int) -> None:
        """Abort all but the first `keep` of those that have begun, and those that have not."""
        kept = [name for name in self.names if name in self.begun][:keep]
        self.core.abort_request([name for name in self.names if name not in set(kept)])
        self.names = kept

    def timed(self, steps: int) -> list[float]:
        """Seconds of the steps, of so many, in which all requests got a token."""
        for _ in range(SETTLE):
            self.step()
        found = [self.step() for _ in range(steps)]
        return [seconds for seconds, served in found if served == len(self.names)]

    def preemptions(self) -> int:
        """Of requests that are in flight."""
        return sum(request.num_preemptions for request in self.scheduler.requests.values())

    def finish(self) -> None:
        """Drop all, and let the engine notice."""
        self.drop(0)
        while self.core.has_unfinished_requests():
            self.core.step()


def single(engine: Any, length: int) -> dict[str, Any]:
    """One request, the best of three."""
    rows = []
    for _ in range(4):  # the first one warms up
        flight = Flight(engine)
        flight.send(length, STEPS)
        start = time.perf_counter()
        while not flight.begun:
            flight.step()
        first = time.perf_counter()
        while flight.core.has_unfinished_requests():
            flight.step()
        rows.append((first - start, (time.perf_counter() - first) / (STEPS - 1)))
    first_s, step_s = (min(column) for column in zip(*rows[1:], strict=True))
    return {"length": length, "first_ms": first_s * 1e3, "step_ms": step_s * 1e3}


def saturated(engine: Any, prompt: int, steps: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """As many requests as there is room, time and leave for; then fewer and fewer."""
    chunks = -(-prompt // arguments.chunk)
    longest = engine.model_config.max_model_len
    fit = requests = capacity(engine, prompt) // prompt
    while True:  # those that were read first decode while the last are read
        requests = min(requests, arguments.most)
        new = min(requests * (chunks + 1) + steps + 10 * (SETTLE + TIMED), longest - prompt)
        if requests == 1 or requests * (prompt + new) <= capacity(engine, prompt + new):
            break
        requests -= 1
    flight = Flight(engine)
    for _ in range(requests):
        flight.send(prompt, new)
    start = time.perf_counter()
    while len(flight.begun) < requests and time.perf_counter() - start < arguments.fill_seconds:
        flight.step()
    while not flight.begun:
        flight.step()
    fill = time.perf_counter() - start
    flight.drop(len(flight.begun))
    flying = len(flight.names)
    seconds = flight.timed(steps)
    step = statistics.mean(seconds) if seconds else float("nan")
    found = {
        "prompt": prompt,
        "requests": flying,
        "fit": fit,
        "preemptions": flight.preemptions(),
        "fill_s": fill,
        "prompt_tokens_per_s": flying * prompt / fill,
        "full_steps": len(seconds),
        "step_ms": step * 1e3,
        "decode_tokens_per_s": flying / step,
        "flight": [{"requests": flying, "tokens_per_s": flying / step}],
    }
    while flying > 1:
        flying = (flying + 1) // 2
        flight.drop(flying)
        some = flight.timed(TIMED)
        if some:
            found["flight"].append({"requests": flying, "tokens_per_s": flying / statistics.mean(some)})
    flight.finish()
    return found
