"""Help and mistakes cost no more than Python itself; each command that the README shows exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import selfindex
from selfindex.cli import app

COMMANDS = sorted(typer.main.get_command(app).commands)
HEAVY = ("torch", "transformers", "numpy", "safetensors")

RUN = f"""
import sys
from selfindex.cli import app
for line in sys.stdin:
    try:
        app(line.split(), prog_name="selfindex")
    except SystemExit as stopped:
        print("exit", stopped.code, *(name for name in {HEAVY} if name in sys.modules))
"""


def run(*lines):
    """Exit codes of command lines, in one process; none may have imported anything heavy."""
    found = subprocess.run(
        [sys.executable, "-c", RUN], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    assert "Traceback" not in found.stderr, found.stderr
    ends = [line.split()[1:] for line in found.stdout.splitlines() if line.startswith("exit ")]
    assert all(len(end) == 1 for end in ends), ends
    return [int(end[0]) for end in ends]


def test_help_imports_nothing_heavy():
    lines = ["--help", "--version", *(f"{command} --help" for command in COMMANDS)]
    assert run(*lines) == [0] * len(lines)


def test_mistakes_import_nothing_heavy():
    usage = [
        "dance",
        "generate",
        "profile m",
        "chat m --speed 3",
        "generate m a --max-new-tokens 0",
        "bench m --new 1",
    ]
    refused = [
        "generate m a --budget 1.5",
        "generate m --file /nowhere/text",
        "generate /nowhere/model a",
        "generate smollm2 a --dtype float8",
        "chat m --load /nowhere/cache",
        "inspect m --file /nowhere/text",
        "bench",
        "bench m --random llama-3.1-8b",
        "bench m --lengths 1k",
        "bench m --output /nowhere/at/all.json",
        "bench /nowhere/model",
        "bench --random nothing",
    ]
    assert run(*usage, *refused) == [2] * len(usage) + [1] * len(refused)


def test_package_imports_its_parts_when_they_are_used():
    code = f"""
import sys, selfindex
assert not [name for name in {HEAVY} if name in sys.modules]
assert set(selfindex.__all__) <= set(dir(selfindex))
selfindex.SelfIndexConfig(budget=0.1)
from selfindex import *
assert SelfIndexCache is selfindex.SelfIndexCache and "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_the_package():
    for name in selfindex.__all__:
        assert getattr(selfindex, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        selfindex.nothing  # noqa: B018


def test_readme_shows_every_command():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"(?:`|    )selfindex ([a-z]+)", readme))) == COMMANDS
