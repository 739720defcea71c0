"""`selfindex demo`: a real model reads a long text, its cache is compressed, then it is asked."""

from __future__ import annotations

import time

import typer

from ..config import EVERY_QUERY, SelfIndexConfig
from ..evaluation.models import SMOLLM2, load
from .console import BUDGET, DEVICE, PRESET, errors_in_one_line, out, parse_budget, progress

COMPARED_TOKENS = 96


def demo(
    budget: str = BUDGET,
    preset: str = PRESET,
    tokens: int = typer.Option(7400, min=64, help="Length of the text."),
    depth: float = typer.Option(0.5, min=0.0, max=1.0, help="Where the fact is hidden: 0 start, 1 end."),
    seed: int = typer.Option(0, help="Picks the number and the part of the text."),
    device: str = DEVICE,
) -> None:
    """Hide a fact in a long text, compress the cache, ask for the fact, compare with dense.

    Exit code 0 if the answer over the compressed cache is right, else 1.
    """
    with errors_in_one_line():
        config = SelfIndexConfig.make(preset=preset, budget=parse_budget(budget), sparse_queries=EVERY_QUERY)
        with progress() as bars:
            start = time.perf_counter()
            loading = bars.add_task("load the model", total=None)
            loaded = load(SMOLLM2, device, "float32")
            bars.update(loading, total=1, completed=1)
            from ..evaluation.texts import manual
            from .screen import screen
            from .trial import run

            loaded_in = time.perf_counter() - start
            result = run(loaded, manual(), config, tokens, depth, seed, bars, COMPARED_TOKENS)
        result.seconds = {"load": loaded_in} | result.seconds
        out.print(screen(result))
        if not result.right(result.ours):
            raise typer.Exit(1)
