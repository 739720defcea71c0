"""`selfindex chat`: a document is read and compressed once, then answers questions."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..config import SelfIndexConfig
from ..errors import SelfIndexError
from ..evaluation.models import Loaded, load, read_text
from ..evaluation.turns import Turns
from .console import (
    DEVICE,
    CommandError,
    check_output,
    err,
    errors_in_one_line,
    parse_budget,
    progress,
    show_error,
)

if TYPE_CHECKING:
    from .conversation import Conversation, Stop

HELP = """\
/report      what the cache holds and reads
/reset       forget the conversation, keep the document
/save FILE   write the compressed document and conversation, for --load
/quit        end (or Ctrl-D); Ctrl-C stops an answer, twice forgets it"""


def chat(
    model: str = typer.Argument(help="Folder, .gguf file or hub id of a model; or smollm2."),
    file: Path | None = typer.Option(None, help="UTF-8 text to read first.", show_default=False),
    saved: Path | None = typer.Option(
        None, "--load", help="Go on from a file of --save, without reading again.", show_default=False
    ),
    save: Path | None = typer.Option(
        None, help="Write the compressed document here once it is read.", show_default=False
    ),
    budget: str | None = typer.Option(
        None,
        help="Encoded tokens read per query: a fraction, a percentage or a number (0.05, or the file's).",
    ),
    preset: str | None = typer.Option(None, help="balanced or paper (balanced, or the file's)."),
    offloading: bool = typer.Option(
        False, "--offloading", help="Keep most of the cache in host memory, for contexts beyond the GPU's."
    ),
    max_new_tokens: int = typer.Option(512, min=1, help="Tokens of an answer at most."),
    raw: bool = typer.Option(False, "--raw", help="Do not use the model's chat template."),
    device: str = DEVICE,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Read a document once, compress it, and answer questions about it.

    Questions are typed, or are the lines of stdin; /help shows the commands. The document need not
    be read again after --save FILE (which writes FILE and FILE.json) and --load FILE.
    """
    with errors_in_one_line():
        share = parse_budget(budget) if budget is not None else None
        config = SelfIndexConfig.make(
            preset=preset or "balanced", budget=0.05 if share is None else share, offloading=offloading
        )
        document = _document(file, saved, save)
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        from .conversation import Conversation

        turns = Turns(loaded.tokenizer, raw)
        if saved is not None:
            with err.status(f"loading {saved}"):
                talk = Conversation.load(loaded, turns, saved, offloading or None)
            if preset not in (None, talk.cache.config.preset):
                raise CommandError(f"{saved} was written with the preset {talk.cache.config.preset}")
            if share is not None:
                talk.set_budget(share)
        else:
            talk = Conversation.start(loaded, turns, config)
        if document is not None:
            _read(talk, document, str(file), max_new_tokens)
        if save is not None:
            talk.save(save)
            err.print(f"written to {save} and {save}.json", soft_wrap=True, markup=False)
        _loop(talk, loaded, max_new_tokens)


def _document(file: Path | None, saved: Path | None, save: Path | None) -> str | None:
    """The text to read, if any; refuses what cannot work before a model is loaded."""
    if file is not None and saved is not None:
        raise CommandError("give a text to read with --file or a saved one with --load, not both")
    if save is not None and file is None and saved is None:
        raise CommandError("nothing to save: give a document with --file")
    if save is not None:
        check_output(save)
    if saved is not None and not saved.is_file():
        raise CommandError(f"no such file: {saved}")
    if str(file) == "-":
        raise CommandError("questions come from stdin; give the document as a file")
    return None if file is None else read_text(file)


def _read(talk: Conversation, document: str, name: str, room: int) -> None:
    with progress() as bars:
        bar = bars.add_task(f"read {name} and compress", total=1.0)
        talk.read(document, room, lambda share: bars.advance(bar, share))
    report = talk.cache.report(missed=False)
    smaller = f", {report.ratio:.1f} times smaller than 16 bit" if report.ratio > 1 else ""
    err.print(f"{talk.document:,} tokens, {report.memory.total / 2**20:.1f} MiB{smaller}")


def _loop(talk: Conversation, loaded: Loaded, most: int) -> None:
    """Ask and answer until the input ends. Typed input survives an error, a script does not."""
    typed = sys.stdin.isatty()
    if typed:
        err.print("Ask, or /help.", style="dim")
    for line in _lines(typed):
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(talk, line)
            elif line:
                _answer(talk, line, loaded, most, typed)
        except (SelfIndexError, OSError) as error:
            if not typed:
                raise
            show_error(error)


def _lines(typed: bool) -> Iterator[str]:
    if not typed:
        yield from map(str.strip, sys.stdin)
        return
    import readline  # noqa: F401  (makes input() editable, with a history)

    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            err.print("\n/quit or Ctrl-D ends", style="dim")
        except EOFError:
            err.print()
            return


def _command(talk: Conversation, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/report":
        err.print(str(talk.cache.report()), soft_wrap=True, markup=False)
    elif name == "/reset":
        talk.reset()
    elif name == "/save" and argument.strip():
        path = Path(argument.strip()).expanduser()
        check_output(path)
        talk.save(path)
        err.print(f"written to {path} and {path}.json", soft_wrap=True, markup=False)
    else:
        err.print(HELP if name == "/help" else f"no command {line!r}\n{HELP}", markup=False)


def _answer(talk: Conversation, question: str, loaded: Loaded, most: int, typed: bool) -> None:
    from .conversation import Stop
    from .streaming import TimedStreamer

    stop, streamer = Stop(), TimedStreamer(loaded.tokenizer, lambda: None)
    try:
        with _first_interrupt_stops(stop):
            talk.ask(question, most, streamer, stop)
    except KeyboardInterrupt:
        err.print("\nstopped; the question is forgotten", style="dim")
        return
    if typed:
        err.print(f"{streamer.tokens} tokens{streamer.speed}", style="dim")


@contextmanager
def _first_interrupt_stops(stop: Stop) -> Iterator[None]:
    """Ctrl-C ends an answer between two tokens; a second one interrupts at once."""

    def handle(*_: object) -> None:
        if stop.wanted:
            raise KeyboardInterrupt
        stop.wanted = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
