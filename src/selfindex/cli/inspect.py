"""`selfindex inspect`: which tokens each head selected, against where its attention really goes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.table import Table

from ..config import BARE_SHARE, EVERY_QUERY, SelfIndexConfig
from ..evaluation.models import encode_start, load, read_text
from .console import (
    DEVICE,
    PRESET,
    CommandError,
    check_output,
    err,
    errors_in_one_line,
    out,
    parse_budget,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..report import Report


def inspect(
    model: str = typer.Argument(help="Folder, .gguf file or hub id of a model; or smollm2."),
    file: Path = typer.Option(help="UTF-8 text; its last tokens are the queries."),
    output: Path = typer.Option(Path("inspect.png"), "--output", "-o", help="Figure to write."),
    queries: int = typer.Option(16, min=1, help="Tokens at the end of the text that ask."),
    tokens: int = typer.Option(4096, min=64, help="Tokens of the text to use at most."),
    budget: str = typer.Option(
        "0.05", help="Encoded tokens read per query: a share, with no least number, or a number."
    ),
    preset: str = PRESET,
    device: str = DEVICE,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Draw what the index selected in every layer and KV head, and what attention it missed."""
    with errors_in_one_line():
        if importlib.util.find_spec("matplotlib") is None:
            raise CommandError('figures need matplotlib: pip install "selfindex[eval]"')
        config = SelfIndexConfig.make(
            preset=preset,
            budget=parse_budget(budget),
            sparse_queries=EVERY_QUERY,
            **BARE_SHARE,
        )
        check_output(output)
        text = read_text(file)
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        ids = encode_start(loaded, text, tokens)
        if ids.shape[1] <= queries + config.front + config.recent + config.page_size:
            raise CommandError(f"{file} gives {ids.shape[1]} tokens: too few for a page to be encoded")
        with err.status(f"reading {ids.shape[1]:,} tokens"):
            found, drawn, report = _look(loaded.model, ids, queries, config)
        from ..evaluation.figures import selection

        title = f"{loaded.name}, {ids.shape[1]:,} tokens, last {queries} asking, {preset} {budget}"
        selection(*drawn, title, output)
        out.print(_table(found))
        out.print(f"The cache itself reports as missed: {report.missed_text}", soft_wrap=True)
        err.print(f"written to {output}")


def _look(
    model: Any, ids: Tensor, queries: int, config: SelfIndexConfig
) -> tuple[dict[str, Any], tuple[Tensor, Tensor, int], Report]:
    """(what `measure` gives, (true mass and share read [layers H, n], KV heads), the cache's own report)."""
    import torch

    from ..evaluation.layers import measure, observe, visible
    from ..evaluation.recording import record
    from ..integrations.transformers import SelfIndexCache
    from ..integrations.transformers.models import cache_argument

    recording = record(model, ids[:, :-queries])
    seen = observe(model, recording, ids[:, -queries:])
    cache = recording.fill(SelfIndexCache(model, config))
    store = cache.compressed_layers[0].store
    assert store is not None
    n, heads = ids.shape[1] - queries, store.format.kv_heads
    share = config.budget_tokens(n, store.encoded(0)) / n
    mass, read = [], []
    for layer, prefix, dense in zip(cache.compressed_layers, recording.tensors, seen, strict=True):
        mass.append(dense.weights[..., :n].mean((1, 2)))
        read.append(visible(layer, prefix, dense.query).float().mean(1))
    found = measure(cache, recording, seen, share)
    with torch.inference_mode():
        model(ids[:, -queries:], **{cache_argument(model): cache, "logits_to_keep": 1})
    return found, (torch.cat(mass).cpu(), torch.cat(read).cpu(), heads), cache.report()


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("layer", "softmax mass read", "worst head", "output error", "oracle's tokens read"):
        table.add_column(column, justify="right")
    for i, (mass, error, overlap) in enumerate(
        zip(found["mass"], found["error"], found["overlap"], strict=True)
    ):
        mean = [sum(x) / len(x) for x in (mass, error, overlap)]
        table.add_row(str(i), f"{mean[0]:.1%}", f"{min(mass):.1%}", f"{mean[1]:.1%}", f"{mean[2]:.1%}")
    return table
