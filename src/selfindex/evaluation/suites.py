"""The named suites of `selfindex eval`."""

from __future__ import annotations

from dataclasses import dataclass

from .tasks import TASKS

ASKED = ("later", "prompt")
"""Where a question stands: after a document that was encoded before, or in the prompt that is encoded."""

PARTS = ("fidelity", "layers", "tasks", "heatmap", "batches")


@dataclass(frozen=True)
class Suite:
    """What is measured. Lengths are tokens of context; a method is meant by the start of its name.

    Attributes:
        fidelity: lengths; `continuation` tokens at their end are predicted.
        layers: lengths at which attention is compared layer by layer.
        tasks: names in TASKS, run at `task_lengths` with `samples` each.
        policies: names in `methods.POLICIES`: which queries of tasks and heatmap select what they read.
            Every query does where predictions and attention are compared.
        batch_tasks: asked at the first of `task_lengths` with one and with several prompts at a time.
        prefills: as `parse_prefill` takes them; how documents of tasks and heatmap are read, besides
            exactly.
        asked: of ASKED, for tasks and heatmap.
        heat: lengths of the needle heatmap; `heat_samples` needles at each of `depths` depths.
    """

    methods: tuple[str, ...]
    heat_methods: tuple[str, ...]
    fidelity: tuple[int, ...]
    continuation: int
    layers: tuple[int, ...]
    tasks: tuple[str, ...]
    task_lengths: tuple[int, ...]
    samples: int
    policies: tuple[str, ...]
    batch_tasks: tuple[str, ...]
    heat: tuple[int, ...]
    depths: int
    heat_samples: int
    prefills: tuple[str, ...] = ()
    asked: str = "later"


SUITES = {
    "quick": Suite(
        methods=("selfindex balanced 5", "selfindex paper", "oracle", "KIVI-2", "Quest", "SnapKV"),
        heat_methods=("selfindex balanced 5", "SnapKV"),
        fidelity=(1280,),
        continuation=128,
        layers=(1280,),
        tasks=("niah_single_2", "passkey"),
        task_lengths=(1024,),
        samples=4,
        policies=("default",),
        batch_tasks=("niah_single_2",),
        heat=(512, 1024),
        depths=4,
        heat_samples=1,
    ),
    "full": Suite(
        methods=(),
        heat_methods=("selfindex balanced 5", "selfindex paper", "Quest", "SnapKV"),
        fidelity=(4096, 8064),
        continuation=256,
        layers=(1024, 2048, 4096, 8064),
        tasks=tuple(TASKS),
        task_lengths=(2048, 4096),
        samples=50,
        policies=("default", "every"),
        batch_tasks=("niah_multikey_1", "program"),
        heat=(1024, 2048, 4096, 8064),
        depths=10,
        heat_samples=8,
    ),
    "long": Suite(
        methods=(
            "fp8", "KIVI", "TurboQuant", "oracle", "Quest", "DoubleSparse", "SnapKV", "transformers",
            "selfindex",
        ),
        heat_methods=("selfindex balanced 5", "Quest", "SnapKV"),
        fidelity=(8192, 16384, 32000),
        continuation=256,
        layers=(8192,),
        tasks=tuple(TASKS),
        task_lengths=(4096, 8192, 16384, 32768),
        samples=50,
        policies=("default", "every"),
        batch_tasks=("niah_multikey_1", "program"),
        heat=(8192, 16384),
        depths=10,
        heat_samples=4,
    ),
}  # fmt: skip
"""No methods: all of them."""
