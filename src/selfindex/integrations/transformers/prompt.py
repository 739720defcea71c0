"""Which prompts are read sparsely, of those that a model hands to a layer."""

from __future__ import annotations

import warnings
from functools import cache

from torch import Tensor

from ...attention.prompt import is_sparse
from ...config import SelfIndexConfig


def reads_sparsely(config: SelfIndexConfig, mask: Tensor | None, tokens: int) -> bool:
    """Whether a prompt of `tokens` positions is read sparsely: not with an unusual mask, which is said once.

    Args:
        mask: as `compact_mask` gives it.
    """
    if not is_sparse(config, tokens):
        return False
    if mask is None or mask.ndim == 2:
        return True
    _say_exact()
    return False


@cache
def _say_exact() -> None:
    warnings.warn(
        "prefill='sparse' reads this prompt exactly: its attention mask is of another kind than causal "
        "attention with padding",
        RuntimeWarning,
        stacklevel=2,
    )
