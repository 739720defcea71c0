"""The guard on transformers' version, and that the versions named in several places are the same."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest
import transformers

from selfindex import versions

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("version", ["5.17.0", "5.24.3", "5.20.0.dev0"])
def test_tested_versions_say_nothing(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_transformers()


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0rc1"])
def test_newer_versions_are_announced(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    with pytest.warns(RuntimeWarning, match=r"was not tested .* 5\.17 to 5\.24 were"):
        versions.check_transformers()


@pytest.mark.parametrize("version", ["5.16.9", "4.57.1"])
def test_older_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match="pip install"):
        versions.check_transformers()


def test_this_version_is_a_tested_one():
    assert versions.transformers_problem(transformers.__version__) is None


def test_all_places_name_the_same_versions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest, newest = (".".join(map(str, v)) for v in (versions.OLDEST, versions.NEWEST))
    assert f"transformers>={oldest}" in project["dependencies"]
    assert f"transformers=={oldest}.0" in (ROOT / "Makefile").read_text()
    assert f"transformers {oldest} to {newest}" in (ROOT / "README.md").read_text()
    minors = re.findall(r"cp3(\d+)-", (ROOT / "pyproject.toml").read_text())
    assert [f"Programming Language :: Python :: 3.{m}" for m in minors] == [
        c for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)
    ]
