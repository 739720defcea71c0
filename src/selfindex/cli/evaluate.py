"""`selfindex eval`: quality against the dense model and other caches, as tables and figures."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import check_budget, parse_prefill
from ..evaluation.models import SMOLLM2, Loaded, load
from .console import DEVICE, CommandError, err, errors_in_one_line, out, parse_budget

if TYPE_CHECKING:
    from ..evaluation.suites import Suite


def evaluate(
    model: str = typer.Argument(SMOLLM2, help="Folder, .gguf file or hub id of a model; or smollm2."),
    suite: str = typer.Option("quick", help="quick (minutes on 2 cores), full or long (for a GPU)."),
    part: list[str] = typer.Option(
        [], help="Only this part: fidelity, layers, tasks, heatmap, batches. Repeatable."
    ),
    text: list[str] = typer.Option(
        [], help="Text to read: a UTF-8 file, or manual, stdlib. Repeatable; without it, these two."
    ),
    output: Path = typer.Option(Path("selfindex-eval"), help="Folder of the results."),
    budget: str = typer.Option(
        "0.05", help="Share of the tokens that sparse methods read, with no least number."
    ),
    method: list[str] = typer.Option(
        [], "--method", "--methods", help="Only methods whose name starts so (and dense). Repeatable, or a,b."
    ),
    task: list[str] = typer.Option(
        [],
        "--task",
        "--tasks",
        help="Only this task or group of them: ruler, code, answers. Repeatable, or a,b.",
    ),
    length: list[str] = typer.Option(
        [], "--length", "--lengths", help="Tokens of context instead of the suite's. Repeatable, or a,b."
    ),
    samples: int = typer.Option(0, help="Samples a task instead of the suite's number."),
    policy: list[str] = typer.Option(
        [],
        help="Queries of tasks that select what they read: default (steps; a question reads everything) "
        "or every. Repeatable, or a,b.",
    ),
    prefill: list[str] = typer.Option(
        [],
        help="Read the documents of tasks in this way as well: sparse, sparse=0.9 (mass) or sparse=10% "
        "(density). Repeatable, or a,b.",
    ),
    asked: str = typer.Option(
        "later",
        help="Where the question of a task stands: later, after a document that is encoded, or prompt, in a "
        "prompt with the document, as model.generate gets it.",
    ),
    batch: int = typer.Option(0, help="Prompts at a time; 0 fits the free memory."),
    minutes: float = typer.Option(0.0, help="Stop soon after so many; the next run goes on. 0: no limit."),
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
        chosen, parts = _suite(suite, part, method, task, length, samples, policy, prefill, asked)
        texts = _texts(text)
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        deadline = time.monotonic() + 60 * minutes if minutes > 0 else math.inf
        result = _run(loaded, chosen, parts, texts, share, output, batch, deadline)
        _write(result, output)


def _listed(given: list[str]) -> list[str]:
    """Repeated options and lists with commas; a comma before a space belongs to a method's name."""
    return [name for value in given for name in re.split(r",(?! )", value) if name]


def _suite(
    name: str,
    parts: list[str],
    methods: list[str],
    tasks: list[str],
    lengths: list[str],
    samples: int,
    policies: list[str],
    prefills: list[str],
    asked: str,
) -> tuple[Suite, list[str]]:
    from ..evaluation.methods import POLICIES
    from ..evaluation.suites import ASKED, PARTS, SUITES
    from ..evaluation.tasks import GROUPS, TASKS

    if name not in SUITES:
        raise CommandError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    suite = SUITES[name]
    _check_known("part", parts, PARTS)
    if methods:
        starts = tuple(_listed(methods))
        suite = replace(suite, methods=starts, heat_methods=starts)
    if tasks:
        _check_known("task", _listed(tasks), [*GROUPS, *TASKS])
        named = [member for task in _listed(tasks) for member in GROUPS.get(task, [task])]
        suite = replace(suite, tasks=tuple(dict.fromkeys(named)))
    if lengths:
        wrong = [value for value in _listed(lengths) if not value.isdecimal() or int(value) < 1]
        if wrong:
            raise CommandError(f"{wrong[0]!r} is not a number of tokens")
        sizes = tuple(map(int, _listed(lengths)))
        suite = replace(suite, fidelity=sizes, layers=sizes, task_lengths=sizes, heat=sizes)
    if samples:
        suite = replace(suite, samples=samples)
    if policies:
        _check_known("policy", _listed(policies), POLICIES)
        suite = replace(suite, policies=tuple(_listed(policies)))
    for text in _listed(prefills):
        parse_prefill(text)  # refuse early
    _check_known("place for a question", [asked], ASKED)
    suite = replace(suite, prefills=tuple(_listed(prefills)), asked=asked)
    return suite, [p for p in PARTS if not parts or p in parts]


def _check_known(what: str, names: list[str], known: Iterable[str]) -> None:
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise CommandError(f"no {what} {', '.join(unknown)}; there are {', '.join(known)}")


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
    deadline: float,
) -> dict[str, Any]:
    from ..evaluation.environment import command_line, describe
    from ..evaluation.methods import head_dim
    from ..evaluation.records import Records
    from ..evaluation.run import Run
    from ..evaluation.summary import summary

    settings: dict[str, Any] = {
        "model": loaded.name,
        "parameters": sum(x.numel() for x in loaded.model.parameters()),
        "head_dim": head_dim(loaded.model),
        "texts": list(texts),
        "budget": budget,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "continuation": suite.continuation,
        "depths": suite.depths,
        "heat_samples": suite.heat_samples,
        "asked": suite.asked,
    }
    records = Records(output / "records.jsonl", settings)
    run = Run(loaded.model, loaded.tokenizer, suite, texts, budget, records, batch or None)
    run.deadline = deadline
    with _bars() as bars:
        for part in parts:
            bar = bars.add_task(part, total=run.total(part))
            run.tick = lambda steps, bar=bar: bars.advance(bar, steps)  # type: ignore[misc]
            run.run(part)
            if not run.late:
                bars.update(bar, completed=run.total(part))
    if run.late:
        err.print("stopped at the time limit: the same command goes on from here")
    command = command_line("selfindex", *sys.argv[1:])
    found = summary(records, list(dict.fromkeys([*run.candidates, *run.quiz.candidates])))
    result = {"environment": describe(command), "settings": settings, "suite": asdict(suite)}
    return result | found | {"unavailable": run.unavailable}


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
