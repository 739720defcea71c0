"""`selfindex eval`: quality against the dense model and other caches, as tables and figures."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import check_budget
from ..evaluation.models import SMOLLM2, Loaded, load
from .console import BUDGET, DEVICE, CommandError, err, errors_in_one_line, out, parse_budget

if TYPE_CHECKING:
    from ..evaluation.suites import Suite


def evaluate(
    model: str = typer.Argument(SMOLLM2, help="Folder, .gguf file or hub id of a model; or smollm2."),
    suite: str = typer.Option("quick", help="quick (minutes on 2 cores) or full (for a GPU)."),
    part: list[str] = typer.Option([], help="Only this part: fidelity, layers, tasks, heatmap. Repeatable."),
    text: list[str] = typer.Option(
        [], help="Text to read: a UTF-8 file, or manual, stdlib. Repeatable; without it, these two."
    ),
    output: Path = typer.Option(Path("selfindex-eval"), help="Folder of the results."),
    budget: str = BUDGET,
    method: list[str] = typer.Option([], help="Only methods whose name starts so (and dense). Repeatable."),
    task: list[str] = typer.Option([], help="Only this task instead of the suite's. Repeatable."),
    length: list[int] = typer.Option([], help="Tokens of context instead of the suite's. Repeatable."),
    samples: int = typer.Option(0, help="Samples a task instead of the suite's number."),
    batch: int = typer.Option(0, help="Prompts at a time; 0 fits the device."),
    device: str = DEVICE,
    dtype: str = typer.Option("float32", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Measure how close a compressed cache stays to the dense model, beside other caches.

    Every finished measurement is a line in OUTPUT/records.jsonl: an interrupted run goes on from
    there. At the end: results.json, report.md and figures.
    """
    with errors_in_one_line():
        if importlib.util.find_spec("numpy") is None:
            raise CommandError('the evaluation needs numpy: pip install "selfindex[eval]"')
        share = parse_budget(budget)
        check_budget(share)
        if isinstance(share, int):
            raise CommandError("give the budget as a share (0.05 or 5%): all methods get the same")
        chosen, parts = _suite(suite, part, method, task, length, samples)
        texts = _texts(text)
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        result = _run(loaded, chosen, parts, texts, share, output, batch)
        _write(result, output)


def _suite(
    name: str, parts: list[str], methods: list[str], tasks: list[str], lengths: list[int], samples: int
) -> tuple[Suite, list[str]]:
    from ..evaluation.suites import PARTS, SUITES
    from ..evaluation.tasks import TASKS

    if name not in SUITES:
        raise CommandError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise CommandError(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    strange = sorted(set(tasks) - set(TASKS))
    if strange:
        raise CommandError(f"no task {', '.join(strange)}; there are {', '.join(TASKS)}")
    suite = SUITES[name]
    if methods:
        suite = replace(suite, methods=tuple(methods), heat_methods=tuple(methods))
    if tasks:
        suite = replace(suite, tasks=tuple(tasks))
    if lengths:
        sizes = tuple(lengths)
        suite = replace(suite, fidelity=sizes, layers=sizes, task_lengths=sizes, heat=sizes)
    if samples:
        suite = replace(suite, samples=samples)
    return suite, [p for p in PARTS if not parts or p in parts]


def _texts(names: list[str]) -> dict[str, str]:
    from ..evaluation.texts import load_text

    try:
        return {Path(name).stem: load_text(name) for name in names or ["manual", "stdlib"]}
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error


def _run(
    loaded: Loaded,
    suite: Suite,
    parts: list[str],
    texts: dict[str, str],
    budget: float,
    output: Path,
    batch: int,
) -> dict[str, Any]:
    from ..evaluation.environment import command_line, describe
    from ..evaluation.methods import head_dim, methods
    from ..evaluation.records import Records
    from ..evaluation.run import Run
    from ..evaluation.summary import summary

    settings: dict[str, Any] = {
        "model": loaded.name,
        "head_dim": head_dim(loaded.model),
        "texts": list(texts),
        "budget": budget,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "continuation": suite.continuation,
        "depths": suite.depths,
        "heat_samples": suite.heat_samples,
    }
    records = Records(output / "records.jsonl", settings)
    run = Run(loaded.model, loaded.tokenizer, suite, texts, budget, records, batch or None)
    with _bars() as bars:
        for part in parts:
            bar = bars.add_task(part, total=run.total(part))
            run.tick = lambda steps, bar=bar: bars.advance(bar, steps)  # type: ignore[misc]
            run.run(part)
            bars.update(bar, completed=run.total(part))
    command = command_line("selfindex", *sys.argv[1:])
    found = summary(records, list(methods(budget, settings["head_dim"])))
    return {"environment": describe(command), "settings": settings, "suite": asdict(suite)} | found


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=err,
    )


def _write(result: dict[str, Any], output: Path) -> None:
    from ..evaluation.report import report

    (output / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figures: list[str] = []
    if importlib.util.find_spec("matplotlib") is None:
        err.print(r'no figures: matplotlib is missing (pip install "selfindex\[eval]")')
    else:
        from ..evaluation.figures import draw

        figures = draw(result, output)
    page = report(result, figures)
    (output / "report.md").write_text(page, encoding="utf-8")
    out.print(Markdown(page[: page.find("![")] if figures else page))
    err.print(f"written to {output}: results.json, report.md{''.join(', ' + name for name in figures)}")
