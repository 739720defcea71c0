"""What every repetition of the same work leaves in memory, and what new lengths and sizes do.

    python scripts/leaks.py --output leaks-cpu.json
    python scripts/leaks.py --device cuda --output leaks-h100.json

Exits with 1 if a use of our cache leaves more than 1 KiB each time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from safetensors.torch import save_file
from tiny_models import forward, prompt
from transformers import DynamicCache
from uses import NAMES, TOKENS, Uses, growth

from selfindex.evaluation.environment import describe


def dense_prompt(uses: Uses, lengths: Iterator[int]) -> Callable[[], None]:
    """A prompt for transformers' own cache, of the next length every time."""

    def use() -> None:
        ids = prompt(next(lengths)).to(uses.device)
        forward(uses.model, ids, DynamicCache(config=uses.model.config))

    return use


def written(uses: Uses, sizes: Iterator[int]) -> Callable[[], None]:
    """A file of safetensors with one tensor, of the next size every time."""

    def use() -> None:
        save_file({"x": torch.zeros(next(sizes), dtype=torch.uint8)}, Path(uses.folder.name) / "tensor")

    return use


def main() -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    uses, found = Uses(args.device, torch.bfloat16), {}
    work = {name: getattr(uses, name) for name in NAMES}
    work["DynamicCache, same length"] = dense_prompt(uses, itertools.repeat(TOKENS))
    work["DynamicCache, new lengths"] = dense_prompt(uses, itertools.count(TOKENS + 1, 3))
    work["safetensors, new sizes"] = written(uses, itertools.count(1000))
    for name, use in work.items():
        # The second time everything that is loaded or filled once is there.
        growth(use, args.repeat, device=args.device)
        found[name] = growth(use, args.repeat, device=args.device)
        print(f"{name:30}", {k: round(n / 1024, 2) if k != "objects" else n for k, n in found[name].items()})
    if args.output:
        command = shlex.join(["python", "scripts/leaks.py", *(Path(a).name for a in sys.argv[1:])])
        result = {"environment": describe(command), "repeat": args.repeat, "growth": found}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(found[name].get("malloc", 0) > 1024 for name in NAMES))


if __name__ == "__main__":
    sys.exit(main())
