"""`selfindex bench`: on this machine, from which length on does the cache pay?"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table

from ..config import SelfIndexConfig
from ..evaluation.models import load, load_random
from .console import (
    BUDGET,
    DEVICE,
    PRESET,
    CommandError,
    budget_text,
    check_output,
    err,
    errors_in_one_line,
    out,
    parse_budget,
    progress,
)

if TYPE_CHECKING:
    from ..evaluation.speed import Bench, Row
    from ..evaluation.timing import Timing

MIB = 2**20
NO_MEMORY = "out of memory"


def bench(
    model: str | None = typer.Argument(None, help="Folder, .gguf file or hub id of a model; or smollm2."),
    random: str | None = typer.Option(
        None,
        help="Instead of MODEL: random weights of this shape, such as llama-3.1-8b.",
        show_default=False,
    ),
    lengths: str | None = typer.Option(
        None, help="Tokens of the prompts, such as 2048,8192 (what fits the model and the memory)."
    ),
    batches: str = typer.Option("1", help="Prompts at a time, such as 1,8."),
    new: int = typer.Option(64, min=2, help="Tokens generated in each measurement."),
    budget: str = BUDGET,
    preset: str = PRESET,
    output: Path | None = typer.Option(
        None, "--output", "-o", help="JSON file of the results.", show_default=False
    ),
    plot: Path | None = typer.Option(None, help="Figure to write (PNG).", show_default=False),
    quiet: bool = typer.Option(False, "--quiet", "-q", help="Show no progress."),
    device: str = DEVICE,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Time and memory of `generate` on this machine, with the model's ordinary cache and with this one.

    Random prompts, greedy. A token's time is a median; the first token's is that of reading the
    prompt. At the end it says from which length on the cache pays.
    """
    with errors_in_one_line():
        if (model is None) == (random is None):
            raise CommandError("give a model or --random SHAPE" + (", not both" if model else ""))
        config = SelfIndexConfig.make(preset=preset, budget=parse_budget(budget))
        sizes = _numbers("lengths", lengths) if lengths is not None else None
        rows_at_a_time = _numbers("batches", batches)
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise CommandError('figures need matplotlib: pip install "selfindex[eval]"')
        for file in (output, plot):
            if file is not None:
                check_output(file)
        with err.status(f"loading {model or random}"):
            if random is not None:
                loaded = load_random(random, device, dtype)
            else:
                loaded = load(model or "", device, dtype)
        with warnings.catch_warnings(record=True) as said:
            from ..evaluation.speed import Bench

            ready = Bench(loaded.model, config, new)
            plan = _plan(ready, sizes, rows_at_a_time)
            settings = {
                "model": loaded.name,
                "device": str(loaded.model.device),
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "preset": preset,
                "budget": config.budget,
                "new": new,
            }
            result = _run(ready, plan, settings, output, quiet)
        _show(result, settings, config)
        for text in sorted({str(warning.message) for warning in said}):
            err.print(f"note: {text}", style="dim", markup=False, soft_wrap=True)
        if plot is not None:
            from ..evaluation.figures import speed

            speed(
                [asdict(row) for row in result],
                "{model}, {dtype} on {device}, {preset} {budget}".format(**settings),
                plot,
            )
        for file in (output, plot):
            if file is not None:
                err.print(f"written to {file}")


def _numbers(name: str, text: str) -> list[int]:
    """Numbers as typed, with commas between; ascending, each once."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise CommandError(f"{name} must be numbers with commas between, such as 1,8, got {text!r}")
    return found


def _plan(ready: Bench, lengths: list[int] | None, batches: list[int]) -> list[tuple[int, int]]:
    """(batch, length) of every row.

    Raises:
        CommandError: a length is beyond the model's positions, or there is no room for a default one.
    """
    if lengths is not None:
        if ready.limit is not None and lengths[-1] + ready.new > ready.limit:
            raise CommandError(
                f"{lengths[-1]:,} tokens and {ready.new:,} new ones do not fit the model's {ready.limit:,}; "
                "lower --lengths or --new"
            )
        return [(batch, length) for batch in batches for length in lengths]
    plan = [(batch, length) for batch in batches for length in ready.default_lengths(batch)]
    if not plan:
        raise CommandError("the free memory or the model's positions are too few for it; give --lengths")
    return plan


def _run(
    ready: Bench, plan: list[tuple[int, int]], settings: dict[str, Any], output: Path | None, quiet: bool
) -> list[Row]:
    """Measure all rows; what is measured is said, and in the output file, at once."""
    rows: list[Row] = []
    bars = progress(live=False)
    bars.disable = quiet
    with bars:
        bar = bars.add_task("", total=len(plan))
        for batch, length in plan:
            bars.update(bar, description=f"{length:,} tokens, batch {batch}", refresh=True)
            rows.append(ready.row(batch, length))
            if not quiet:
                bars.console.print(_line(rows[-1], len(rows), len(plan)), soft_wrap=True, highlight=False)
            bars.advance(bar)
            if output is not None:
                _write(rows, settings, output)
    return rows


def _write(rows: list[Row], settings: dict[str, Any], output: Path) -> None:
    from ..evaluation.environment import command_line, describe

    environment = describe(command_line("selfindex", *sys.argv[1:]))
    result = {"environment": environment, "settings": settings, "rows": [asdict(row) for row in rows]}
    output.write_text(json.dumps(result | {"verdicts": _verdicts(rows)}, indent=1) + "\n", encoding="utf-8")


def _verdicts(rows: list[Row]) -> list[str]:
    from ..evaluation.speed import verdict

    return [verdict(batch, rows) for batch in sorted({row.batch for row in rows})]


def _show(rows: list[Row], settings: dict[str, Any], config: SelfIndexConfig) -> None:
    budget = budget_text(config.budget, config.min_tokens)
    title = f"{{model}}, {{dtype}} on {{device}}; {{preset}}, budget {budget}"
    out.print(_table(rows, settings["device"].startswith("cuda"), title.format(**settings)))
    for sentence in _verdicts(rows):
        out.print(sentence, soft_wrap=True)


def _line(row: Row, number: int, of: int) -> str:
    """One row, as soon as it is measured: a run on a CPU takes minutes, and its table comes at the end."""
    dense, ours = (f"{x.ms:.2f} ms a token" if x else NO_MEMORY for x in (row.dense, row.ours))
    return f"{number} of {of}: batch {row.batch}, {row.length:,} tokens: dense {dense}, ours {ours}"


def _table(rows: list[Row], cuda: bool, title: str) -> Table:
    peak = "all that PyTorch had allocated" if cuda else "growth of the process"
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=f"dense/ours; peak: {peak}", padding=0)
    for column in (
        "batch", "tokens", "dense\nms/token", "ours\nms/token", "ratio", "first\ntoken s", "cache\nMiB",
        "peak\nMiB", "graph",
    ):  # fmt: skip
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        dense, ours = row.dense, row.ours
        table.add_row(
            str(row.batch),
            f"{row.length:,}",
            f"{dense.ms:.2f}" if dense else NO_MEMORY,
            f"{ours.ms:.2f}" if ours else NO_MEMORY,
            f"{dense.ms / ours.ms:.2f}x" if dense and ours else "-",
            _both(row, lambda x: f"{x.first:.2f}"),
            _both(row, lambda x: _mib(x.cache)),
            _both(row, lambda x: _mib(x.peak)),
            (f"{ours.replayed:.0%}" if ours.replayed else "no") if ours else "-",
        )
    return table


def _both(row: Row, text: Callable[[Timing], str]) -> str:
    return "/".join("-" if x is None else text(x) for x in (row.dense, row.ours))


def _mib(size: int) -> str:
    return f"{size / MIB:,.{0 if size >= 100 * MIB else 1}f}"
