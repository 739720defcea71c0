"""Write docs/models.md from the lists of model families that the tests run.

python scripts/models_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import families  # noqa: E402
import refused_families  # noqa: E402
import tiny_models  # noqa: E402
import vision_families  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

FILE = ROOT / "docs" / "models.md"
EVERY, WINDOWS, STATES = (
    "all",
    "all without a window or chunks",
    "all without a state or convolution",
)
ANY, WINDOW, RECORDED, NEVER = "any length", "see 1", "see 2", "see 3"

INTRO = """# Model families

Written by `python scripts/models_table.py` from the lists that the tests run; a test compares. Every
family is run on a tiny random model with transformers 5.24, and with 5.17 where that has it. "Exact" is:
bit for bit the dense model while nothing is encoded, and after that the dense model over the decoded
keys and values, but for rounding.

Run for every text model: prefill, decode steps and chunks, exact, with and without left padding, in both
presets; greedy, sampling, beams and chunked prefill in `generate`; `selfindex.generate`; crop; rows that
change place; forks; float16 and bfloat16; eager attention; the prepared model without the cache and with
another one. Run for every vision-language model: an image in the prompt, decode steps and chunks, greedy
and beams. `pytest -m wide` runs what the default run leaves out.

Layers that are not compressed stay as transformers has them. Any other family is refused, or tried with
`allow_untested=True`, which skips the list and none of the other checks.

"""
NOTES = """
1. Until a window is full, and after that what came since `cache.activate_past_recording()`, as in
   transformers.
2. What came since `cache.activate_past_recording()`, as in transformers.
3. A recurrent state cannot go back: refused, except to nothing. A `cache.fork()` made before the tokens
   does the same.
"""


def text_rows() -> list[tuple[str, ...]]:
    """(model_type, architecture, head dim, compressed layers, crop) of text models, sorted."""
    found = {}
    for name, (_, _, _, dim, _) in tiny_models.SPECS.items():
        kind = "gemma3_text" if name == "gemma3" else name
        hybrid = name in tiny_models.HYBRIDS
        found[kind] = (dim, WINDOWS if hybrid else EVERY, WINDOW if hybrid else ANY)
    for name, options in families.MORE.items():
        layers, crop = EVERY, ANY
        if name in families.WINDOWS:
            layers, crop = WINDOWS, WINDOW
        if name in families.STATES:
            layers, crop = STATES, RECORDED if options.get("layer_types", [""])[0] == "conv" else NEVER
        found[name] = (families.head_dim(name), layers, crop)
    return [
        (f"`{kind}`", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], str(dim), *rest)
        for kind, (dim, *rest) in sorted(found.items())
    ]


def vision_rows() -> list[tuple[str, ...]]:
    """(model_type, architecture, text model) of vision-language models, sorted."""
    return [
        (
            f"`{kind}`",
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind],
            f"`{text['model_type']}`" if "model_type" in text else "its own",
        )
        for kind, (text, *_) in sorted(vision_families.SPECS.items())
    ]


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join((lines[0], "|" + "---|" * len(rows[0]), *lines[1:])) + "\n"


def document() -> str:
    """What docs/models.md has to say."""
    supported = {*tiny_models.SPECS, *families.MORE}
    refused = []
    for kind, (options, what) in sorted(refused_families.REFUSED.items()):
        # Of a family that is supported otherwise, the last option is what makes the difference.
        what += " (`{}={}`)".format(*list(options.items())[-1]) if kind in supported else ""
        refused.append((f"`{kind}`", what))
    return (
        INTRO
        + "## Text models\n"
        + table(("`model_type`", "architecture", "head dim run", "compressed layers", "crop"), *text_rows())
        + NOTES
        + "\n## Vision-language models\n"
        + table(("`model_type`", "architecture", "text model run"), *vision_rows())
        + "\n## Refused, when the cache is made\n"
        + "Encoder-decoder models as well.\n\n"
        + table(("`model_type`", "the refusal says"), *refused)
    )


if __name__ == "__main__":
    FILE.write_text(document())
