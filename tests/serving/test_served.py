"""evals/served.py against a real server, beside the library on the same samples."""

import json
import sys

import pytest
import torch
from serving.engines import make_writer

from evals import served

TASKS, LENGTH, SAMPLES = ("niah_single_2", "niah_multivalue"), 1500, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_writer(folder)
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["served", *map(str, words)])
    served.main()


@pytest.mark.slow
def test_served_tasks_beside_the_library(model, tmp_path, monkeypatch, capsys):
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    words = [model, "--out", tmp_path, "--tasks", *TASKS, "--lengths", LENGTH, "--samples", SAMPLES]
    words += ["--texts", "manual", "--device", device, "--dtype", dtype, "--eager", "--caches", "selfindex"]
    run(monkeypatch, *words, "--library", "--output", tmp_path / "served.json")
    found = json.loads((tmp_path / "served.json").read_text())["found"]
    assert [(row["task"], row["length"]) for row in found] == [(t, LENGTH) for t in (*TASKS, "mean")]
    methods = {"served selfindex", "library selfindex", "library dense"}
    assert all(row["scores"].keys() == methods and "difference" in row for row in found)
    lines = (tmp_path / "served.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines[1:]]
    assert len(answers) == len(TASKS) * SAMPLES
    assert all(len(row["reply"]) > 8 for row in answers)
    table = capsys.readouterr().out.splitlines()[-len(found) :]
    assert [line.split()[0] for line in table] == [*TASKS, "mean"]

    # All is answered: the same command starts no server.
    monkeypatch.setattr(served, "Server", None)
    run(monkeypatch, *words, "--records", tmp_path / "library" / "records.jsonl")
    assert (tmp_path / "served.jsonl").read_text().splitlines() == lines
    assert capsys.readouterr().out.splitlines()[-len(found) :] == table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "chat", "--lengths", 4096], "several turns"),
        (["--url", "http://127.0.0.1:1"], "name with --caches the one cache"),
    ],
)
def test_what_cannot_be_asked(model, tmp_path, monkeypatch, capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, model, "--out", tmp_path, "--samples", 1, "--texts", "manual", *words)
    assert said in f"{stopped.value} {capsys.readouterr().err}"


def test_records_of_another_model_are_refused(model, tmp_path, monkeypatch):
    records = tmp_path / "records.jsonl"
    records.write_text(
        json.dumps({"settings": {"model": "other", "texts": ["manual"], "budget": 0.05}}) + "\n"
    )
    with pytest.raises(SystemExit, match="has model other"):
        run(monkeypatch, model, "--out", tmp_path, "--texts", "manual", "--records", records)
