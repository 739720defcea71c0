"""The list of supported families, what the tests run, and what the documentation says are the same."""

import runpy
from pathlib import Path

import families
import pytest
import refused_families
import tiny_models
import transformers
import vision_families
from packaging.version import Version

from selfindex.integrations.transformers.families import REFUSED, TESTED

ROOT = Path(__file__).parents[2]


def test_every_supported_family_is_run_and_the_other_way_round():
    # The text model of Gemma 3 has a type of its own; test_vision runs the whole.
    run = {*tiny_models.SPECS, "gemma3_text", *families.MORE, *vision_families.SPECS}
    assert set(TESTED) == run
    assert list(TESTED) == sorted(run)


def test_families_refused_by_name_are_tested_and_not_supported():
    assert set(REFUSED) <= set(refused_families.REFUSED)
    assert not set(REFUSED) & set(TESTED)


newest = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="older versions lack some of the families"
)


@newest
def test_no_family_is_left_out():
    assert all(map(families.available, families.MORE))
    assert all(map(vision_families.available, vision_families.SPECS))


@newest
def test_the_table_in_the_documentation_is_what_the_tests_run():
    script = runpy.run_path(str(ROOT / "scripts" / "models_table.py"))
    assert (ROOT / "docs" / "models.md").read_text() == script["document"](), (
        "run `python scripts/models_table.py`"
    )
