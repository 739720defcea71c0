"""The pages that scripts write are what the scripts write today: nobody edits them by hand."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {  # of benchmarks/ and evals/
    "report": "performance.md",
    "reliability": "reliability.md",
    "evals.levels_page": "levels.md",
    "evals.prefill": "prefill.md",
    "evals.quality": "quality.md",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_is_what_its_script_writes(script, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    written = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    monkeypatch.setattr(figure, "savefig", lambda *_, **__: None)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    importlib.import_module(script).main()
    assert [path.name for path in written] == [SCRIPTS[script]]
    for path, text in written.items():
        assert path.read_text() == text, f"run {script}"
