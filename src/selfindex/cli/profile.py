"""`selfindex profile`: the small per-model file with the balance of every layer."""

from __future__ import annotations

from pathlib import Path

import typer

from ..evaluation.models import encode_start, load, read_text
from .console import DEVICE, CommandError, check_output, err, errors_in_one_line

LEAST = 256
"""Tokens a profile is measured on at least: fewer say less than a prompt's own first page."""


def profile(
    model: str = typer.Argument(help="Folder, .gguf file or hub id of a model; or smollm2."),
    file: Path = typer.Option(help="A UTF-8 text of the kind the model reads."),
    output: Path = typer.Option(
        Path("profile.safetensors"), "--output", "-o", help="File to write, for SelfIndexCache(profile=...)."
    ),
    tokens: int = typer.Option(4096, min=LEAST, help="Tokens of the text to use at most."),
    device: str = DEVICE,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Measure the balance of a model's keys and queries on a text, once for all prompts.

    The cache works without it, and measures the balance on the first page of every prompt. With
    it, pages of different prompts have the same constants.
    """
    with errors_in_one_line():
        check_output(output)
        text = read_text(file)
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        ids = encode_start(loaded, text, tokens)
        if ids.shape[1] < LEAST:
            raise CommandError(f"{file} gives {ids.shape[1]} tokens; a profile needs {LEAST}")
        from ..codec import BalanceProfile, measure_balance
        from ..evaluation.recording import record

        with err.status(f"reading {ids.shape[1]:,} tokens"):
            recording = record(loaded.model, ids)
        balance = {}
        for layer, (query, keys, _, _) in zip(recording.layers, recording.tensors, strict=True):
            square = query[0].float().square().unflatten(0, (keys.shape[1], -1)).mean((1, 2))
            balance[layer] = measure_balance(keys, square)
        BalanceProfile(balance).save(output)
        size = output.stat().st_size / 1024
        err.print(f"{output}: {len(balance)} layers, {size:.0f} KiB, from {ids.shape[1]:,} tokens")
