"""Text that appears while it is generated."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


class TimedStreamer(TextStreamer):
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

    @property
    def speed(self) -> str:
        """Tokens per second after the first one, in words; empty if there is no second."""
        steps = self.tokens - 1
        return f", then {steps / (self.last - self.first):.1f} tokens/s" if steps > 0 else ""
