"""`selfindex generate`: text from any supported model over a self-indexing cache."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import DynamicCache, TextStreamer

from ..config import SelfIndexConfig
from ..integrations.transformers import SelfIndexCache
from .console import BUDGET, DEVICE, PRESET, CommandError, err, errors_in_one_line, parse_budget
from .models import Loaded, load, quiet, read_text


class _TimedStreamer(TextStreamer):
    """Prints text as it comes, counts tokens, and notes when the first and the last one came."""

    def __init__(self, tokenizer: Any, on_first: Callable[[], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_first = on_first
        self.tokens, self.first, self.last = -1, 0.0, 0.0  # the first call brings the prompt

    def put(self, value: Any) -> None:
        self.tokens += 1
        self.last = time.perf_counter()
        if self.tokens == 1:
            self.first = self.last
            self.on_first()
        super().put(value)


def generate(
    model: str = typer.Argument(help="Folder, .gguf file or hub id of a model; or smollm2."),
    prompt: str | None = typer.Argument(None, help="Prompt; without it and --file, stdin is read."),
    file: Path | None = typer.Option(None, help="Read the prompt from a UTF-8 file."),
    budget: str = BUDGET,
    preset: str = PRESET,
    offloading: bool = typer.Option(
        False, "--offloading", help="Keep most of the cache in host memory, for contexts beyond the GPU's."
    ),
    max_new_tokens: int = typer.Option(256, min=1, help="Tokens to generate at most."),
    dense: bool = typer.Option(False, "--dense", help="Use the model's ordinary cache, to compare."),
    raw: bool = typer.Option(False, "--raw", help="Do not wrap the prompt in the model's chat template."),
    device: str = DEVICE,
    dtype: str = typer.Option("auto", help="auto, float32, bfloat16 or float16."),
) -> None:
    """Generate text; the text goes to stdout, a report on the cache to stderr."""
    with errors_in_one_line():
        config = SelfIndexConfig.make(preset=preset, budget=parse_budget(budget), offloading=offloading)
        text = _read_prompt(prompt, file)
        quiet()
        with err.status(f"loading {model}"):
            loaded = load(model, device, dtype)
        ids = _encode(loaded, text, raw)
        _check_length(loaded, ids.shape[1], max_new_tokens)
        cache = DynamicCache(config=loaded.model.config) if dense else SelfIndexCache(loaded.model, config)
        _run(loaded, ids, cache, max_new_tokens)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise CommandError("give the prompt as an argument or with --file, not both")
    if file is not None:
        prompt = read_text(file)
    elif prompt is None:
        if sys.stdin.isatty():
            raise CommandError("no prompt: give it as an argument, with --file, or on stdin")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise CommandError("the prompt is empty")
    return prompt


def _encode(loaded: Loaded, text: str, raw: bool) -> torch.Tensor:
    """Token ids [1, N] of a prompt, in the model's chat template where it has one."""
    tokenizer = loaded.tokenizer
    chat = not raw and getattr(tokenizer, "chat_template", None) is not None
    if chat:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    if ids.shape[1] == 0:
        raise CommandError("the prompt has no tokens")
    return ids.to(loaded.model.device)


def _check_length(loaded: Loaded, prompt: int, new: int) -> None:
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and prompt + new > limit:
        raise CommandError(
            f"{prompt:,} prompt tokens and {new:,} new ones do not fit the model's {limit:,}; "
            "shorten the prompt or lower --max-new-tokens"
        )


def _run(loaded: Loaded, ids: torch.Tensor, cache: Any, max_new_tokens: int) -> None:
    prompt = ids.shape[1]
    start = time.perf_counter()
    with torch.inference_mode(), err.status(f"reading {prompt:,} tokens") as status:
        streamer = _TimedStreamer(loaded.tokenizer, status.stop)
        loaded.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
            **{loaded.cache_argument: cache},
        )
    steps = streamer.tokens - 1
    speed = f", then {steps / (streamer.last - streamer.first):.1f} tokens/s" if steps > 0 else ""
    err.rule(style="dim")
    err.print(
        f"{prompt:,} prompt tokens, {streamer.tokens} new ones; "
        f"first after {streamer.first - start:.1f} s{speed} on {loaded.model.device}"
    )
    if isinstance(cache, SelfIndexCache):
        err.print(str(cache.report()), soft_wrap=True, markup=False)
    else:
        err.print("dense cache (16 or 32 bits a number, every token read at every step)")
