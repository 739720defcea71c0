"""The command `selfindex`. One file a command; each module's function of that name is the command.

What is imported here is imported for `--help` and for every mistyped option, so none of it imports
PyTorch or transformers: the functions do, once their arguments are known to be right.
"""

from __future__ import annotations

import typer

from .. import __version__
from . import bench, chat, demo, evaluate, generate, inspect, profile

app = typer.Typer(
    name="selfindex",
    help="A self-indexing KV cache: compressed keys that find the few tokens a query attends to.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command("eval")(evaluate.evaluate)
app.command()(bench.bench)
app.command()(inspect.inspect)
app.command()(profile.profile)


@app.command("doctor")
def _doctor() -> None:
    """Show versions, devices, backend and optional parts, then check that the operators work.

    Exit code 0 if the self-check passes, else 1.
    """
    from .doctor import doctor

    doctor()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selfindex {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Options that come before the command."""


__all__ = ["app"]
