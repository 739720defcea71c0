"""The demo's one screen."""

from __future__ import annotations

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

from ..backends.cpu.loader import NativeUnavailable, instruction_set
from .console import budget_text
from .measure import Reply
from .trial import Result

WIDTH = 98


def screen(result: Result) -> RenderableType:
    """What happened, dense and ours side by side, and what it cost."""
    parts = Group(_story(result), _table(result), Padding(_notes(result), (0, 2)))
    return Constrain(parts, WIDTH)


def _story(result: Result) -> Panel:
    task = result.task
    text = (
        f"{result.model} read [bold]{task.document.shape[1]:,} tokens[/] of the Python manual. "
        f"Hidden at {100 * result.depth:.0f} % of the text: [bold]{escape(task.fact)}[/] "
        "Then the KV cache was compressed, and only after that the question was asked: "
        f"[bold]{escape(task.question)}[/]"
    )
    return Panel(text, title="selfindex demo", title_align="left", border_style="dim")


def _table(result: Result) -> Table:
    report, config, same, mib = result.report, result.config, result.fidelity, 2**20
    cached, read = result.cached, result.read_tokens
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("dense cache", ratio=1)
    budget = budget_text(config.budget, config.min_tokens)
    table.add_column(f"self-indexing ({config.preset}, {budget})", ratio=1)
    table.add_row("answer", escape(result.dense.text), escape(result.ours.text))
    table.add_row("", _verdict(result, result.dense), _verdict(result, result.ours))
    table.add_row(
        "tokens read per step",
        f"{cached:,} of {cached:,}",
        f"[bold]{read:,}[/] of {cached:,} ({read / cached:.1%})",
    )
    table.add_row(
        "memory of the text",
        f"{report.dense_bytes / mib:.1f} MiB in 16 bits",
        f"[bold]{report.memory.total / mib:.1f} MiB[/], {report.ratio:.1f} times smaller",
    )
    table.add_row(
        "  per token, all layers",
        _bytes(result, report.dense_bytes),
        f"{_bytes(result, report.memory.total)}, all included",
    )
    table.add_row(
        "  encoded, per token and head", f"{result.dense_pair_bytes} bytes", f"{result.pair_bytes:.1f} bytes"
    )
    table.add_row(
        "same next token as dense",
        "",
        f"[bold]{same.same} of {same.tokens}[/] ({same.same / same.tokens:.1%})",
    )
    table.add_row("KL divergence from dense", "", f"[bold]{same.kl:.4f}[/] nats per token")
    table.add_row("speed", _speed(result.dense), _speed(result.ours))
    return table


def _verdict(result: Result, answer: Reply) -> str:
    return (
        "[bold green]right[/]" if result.right(answer) else f"[bold red]wrong[/], it is {result.task.answer}"
    )


def _bytes(result: Result, total: int) -> str:
    return f"{total / result.report.layers[0].tokens:,.0f} bytes"


def _speed(answer: Reply) -> str:
    return f"{1 / answer.seconds_per_token:.1f} tokens/s"


def _backend(device: str) -> str:
    if torch.device(device).type == "cuda":
        return "selfindex doctor says which kernels run on this GPU"
    try:
        return f"the CPU's operators are compiled ({instruction_set()})"
    except NativeUnavailable:
        return "the compiled operators are missing, PyTorch's save memory but not time: selfindex doctor"


def _notes(result: Result) -> str:
    """Costs, in plain words."""
    seconds, compared = result.seconds, result.fidelity.tokens
    ratio = result.ours.seconds_per_token / result.dense.seconds_per_token
    speed = f"{ratio:.1f} times slower" if ratio > 1 else f"{1 / ratio:.1f} times faster"
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"A step is {speed} than dense here ({result.device}); {_backend(result.device)}. "
        f"Reading is exact attention and not sped up; compressing took {result.encode_seconds:.1f} s of it. "
        f"Agreement and KL: over the {compared} tokens that follow in the text, "
        "every query selecting its own tokens.\n"
        f"[dim]Time: {stages}; {sum(seconds.values()):.0f} s in all.[/]"
    )
