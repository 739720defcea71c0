"""Constants that were measured at an earlier start, in the user's cache folder, by model and rank."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...backends.cuda.loader import cache_folder
from ...codec import BalanceProfile
from ...config import Preset
from ...errors import FormatError
from ...files import write_tensors

VERSION = "1"
"""Of how they are measured: another one, another file."""

_SAMPLE = 64
"""Elements of a weight that tell it from another one."""

_FOLDERS = {"balanced": "balance", "paper": "statistics"}
_FORMAT = {"format": "selfindex-statistics", "version": "1"}
"""Of a file with the statistics of the paper preset; a balance is kept as a profile."""


def layer_index(name: str) -> int:
    """Number of a layer by its name in the model, as "model.layers.7.self_attn.attn"."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(name))


def place(runner: Any, preset: Preset, tokens: int) -> Path:
    """File of this model's constants on this rank, measured on so many tokens."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    name = f"{fingerprint(runner, tokens)}-{rank}-of-{ranks}.safetensors"
    return cache_folder() / _FOLDERS[preset] / name


def fingerprint(runner: Any, tokens: int) -> str:
    """Tells models apart by their configuration and a sample of every weight of this rank."""
    model = runner.get_model()
    facts = {
        k: v
        for k, v in runner.model_config.hf_config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version")
    }
    text = json.dumps([VERSION, tokens, facts], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        digest.update(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def load(path: Path, preset: Preset, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """What was measured before, of layers by name; None if there is nothing, or nothing that fits."""
    try:
        found = BalanceProfile.load(path).balance if preset == "balanced" else _statistics(path)
    except FormatError:
        return None
    chosen = {name: found.get(layer_index(name)) for name in shapes}
    if any(x is None or tuple(x.shape) != shapes[name] for name, x in chosen.items()):
        return None
    return {name: x for name, x in chosen.items() if x is not None}


def save(path: Path, preset: Preset, found: dict[str, Tensor]) -> None:
    """Keep what was measured; without a place to keep it, the next start measures again."""
    from vllm.logger import init_logger

    by_index = {layer_index(name): x for name, x in found.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if preset == "balanced":
            BalanceProfile(by_index).save(path)
        else:
            write_tensors({str(i): x.contiguous() for i, x in by_index.items()}, path, _FORMAT)
    except OSError as error:
        init_logger("vllm.selfindex").warning(
            "the constants of keys cannot be kept and are measured at every start: %s", error
        )


def _statistics(path: Path) -> dict[int, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            found = {int(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever a damaged file makes the library raise
        raise FormatError(f"cannot read {path}: {error}") from error
    if meta != _FORMAT or not all(torch.isfinite(x).all() for x in found.values()):
        raise FormatError(f"{path} does not hold statistics of keys")
    return found
