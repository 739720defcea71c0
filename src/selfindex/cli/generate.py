"""`selfindex generate`: text from any supported model over a self-indexing cache."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config import SelfIndexConfig, parse_prefill
from ..evaluation.models import Loaded, check_length, load, read_text
from ..evaluation.turns import Turns, with_document
from .console import BUDGET, DEVICE, PREFILL, PRESET, CommandError, err, errors_in_one_line, parse_budget

if TYPE_CHECKING:
    from torch import Tensor

STDIN = Path("-")


def generate(
    model: str = typer.Argument(help="Folder, .gguf file or hub id of a model; or smollm2."),
    prompt: str | None = typer.Argument(
        None, help="Prompt, or the question about --file; - or none of both: read from stdin."
    ),
    file: Path | None = typer.Option(
        None, help="UTF-8 text to read before the prompt, or alone; - is stdin.", show_default=False
    ),
    budget: str = BUDGET,
    preset: str = PRESET,
    prefill: str = PREFILL,
    offloading: bool = typer.Option(
        False, "--offloading", help="Keep most of the cache in host memory, for contexts beyond the GPU's."
    ),
    pinned: int = typer.Option(
        0, min=0, help="Prompt tokens that each head keeps exactly, those its end looks at; 128 is good."
    ),
    max_new_tokens: int = typer.Option(256, min=1, help="Tokens to generate at most."),
    dense: bool = typer.Option(False, "--dense", help="Use the model's ordinary cache, to compare."),
    raw: bool = typer.Option(False, "--raw", help="Do not wrap the prompt in the model's chat template."),
    device: str = DEVICE,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Generate text; the text goes to stdout, a report on the cache to stderr."""
    with errors_in_one_line():
        given = {"budget": parse_budget(budget), "offloading": offloading} | parse_prefill(prefill)
        config = SelfIndexConfig.make(preset=preset, pinned_tokens=pinned, **given)
        text = _read_prompt(prompt, file)
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        ids = _encode(loaded, text, raw)
        check_length(loaded, ids.shape[1], max_new_tokens)
        _run(loaded, ids, _cache(loaded, config, dense), max_new_tokens)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """A document, then what is asked about it; either may be all there is."""
    if prompt == "-" and file == STDIN:
        raise CommandError("stdin can be the prompt or the --file, not both")
    if prompt is None and file is None:
        if sys.stdin.isatty():
            raise CommandError("no prompt: give it as an argument, with --file, or on stdin")
        prompt = "-"
    if prompt == "-":
        prompt = read_text(STDIN)
    elif prompt is not None and not prompt.strip():
        raise CommandError("the prompt is empty")
    if file is None:
        assert prompt is not None
        return prompt
    return read_text(file) if prompt is None else with_document(read_text(file), prompt)


def _encode(loaded: Loaded, text: str, raw: bool) -> Tensor:
    """Token ids [1, N] of a prompt, in the model's chat template where it has one."""
    import torch

    turns = Turns(loaded.tokenizer, raw)
    ids = turns.encode(turns.message(text), start=True)
    if not ids:
        raise CommandError("the prompt has no tokens")
    return torch.tensor([ids], device=loaded.model.device)


def _cache(loaded: Loaded, config: SelfIndexConfig, dense: bool) -> Any:
    from transformers import DynamicCache

    from ..integrations.transformers import SelfIndexCache

    return DynamicCache(config=loaded.model.config) if dense else SelfIndexCache(loaded.model, config)


def _run(loaded: Loaded, ids: Tensor, cache: Any, max_new_tokens: int) -> None:
    import torch

    from ..integrations.transformers import SelfIndexCache
    from .streaming import TimedStreamer

    prompt = ids.shape[1]
    start = time.perf_counter()
    with torch.inference_mode(), err.status(f"reading {prompt:,} tokens") as status:
        streamer = TimedStreamer(loaded.tokenizer, status.stop)
        loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            **{loaded.cache_argument: cache},
        )
    err.rule(style="dim")
    err.print(
        f"{prompt:,} prompt tokens, {streamer.tokens} new ones; "
        f"first after {streamer.first - start:.1f} s{streamer.speed} on {loaded.model.device}"
    )
    if isinstance(cache, SelfIndexCache):
        err.print(str(cache.report()), soft_wrap=True, markup=False)
    else:
        err.print("dense cache (16 or 32 bits a number, every token read at every step)")
