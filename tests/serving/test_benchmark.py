"""benchmarks/serving.py on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving.engines import make_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_parts_are_measured(tmp_path):
    make_model("llama", tmp_path / "model")
    sizes = ["--lengths", "512", "--saturate", "1024:16", "--mixed", "8:6", "--mixed-lengths", "128", "512"]
    sizes += [
        "--most",
        "5",
        "--chunk",
        "512",
        "--eager",
        "--model",
        str(tmp_path / "model"),
        "--memory",
        "0.1",
    ]
    found, environment = [], dict(os.environ)
    environment.pop("SELFINDEX_CPU", None)  # the operators that users get
    for parts in (("single", "saturated"), ("mixed",)):
        output = tmp_path / f"{parts[0]}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--caches", "selfindex"]
        command += ["--parts", *parts, *sizes, "--output", str(output)]
        run = subprocess.run(command, text=True, capture_output=True, env=environment)
        assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
        assert "prompts share no prefix, prefix caching is off" in run.stdout
        found.append(json.loads(output.read_text()))
    (many,) = found[0]["results"]["selfindex"]["saturated"]
    assert many["requests"] == 5 < many["fit"]
    assert many["full_steps"] == 16
    assert [some["requests"] for some in many["flight"]] == [5, 3, 2, 1]
    (one,), (mixed,) = (found[i]["results"]["selfindex"][part] for i, part in enumerate(("single", "mixed")))
    assert one["length"] == 512
    assert mixed["completed"] == 6
    assert found[0]["results"]["selfindex"]["capacity"] > 1000
