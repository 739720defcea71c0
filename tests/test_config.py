import copy
import dataclasses
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import pair

from selfindex import ConfigError, SelfIndexCache, SelfIndexConfig
from selfindex.config import AUTO, MOST, parse_prefill


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": 0}, "integer budget"),
        ({"budget": -3}, "integer budget"),
        ({"budget": 0.0}, r"in \(0, 1\]"),
        ({"budget": 1.01}, r"in \(0, 1\]"),
        ({"budget": float("nan")}, r"in \(0, 1\]"),
        ({"budget": float("inf")}, r"in \(0, 1\]"),
        ({"budget": True}, "number"),
        ({"budget": "5%"}, "number"),
        ({"budget": None}, "number"),
        ({"budget": np.float64("nan")}, r"in \(0, 1\]"),
        ({"budget": torch.tensor(0.5)}, "number"),
        ({"budget": 1 + 0j}, "number"),
        ({"budget": 2**31}, "integer budget"),
        ({"preset": "best"}, "preset must be one of"),
        ({"preset": ["paper"]}, "preset must be one of"),
        ({"preset": np.array(["paper", "paper"])}, "preset must be one of"),
        ({"sinks": -2}, "sinks"),
        ({"recent": 1.5}, "recent"),
        ({"recent": True}, "recent"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"dense_below": -1}, "dense_below"),
        ({"sparse_queries": "8"}, "sparse_queries"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": 12}, "page_size"),
        ({"page_size": 64.0}, "page_size"),
        ({"page_size": True}, "page_size"),
        ({"page_size": 1 << 20}, "page_size"),
        ({"sinks": 2**31}, "sinks"),
        ({"sinks": torch.tensor(4)}, "sinks"),
        ({"sinks": None}, "sinks"),
        ({"recent": float("nan")}, "recent"),
        ({"min_tokens": "128"}, "min_tokens"),
        ({"dense_below": MOST + 1}, "dense_below"),
        ({"sparse_queries": np.float64(8)}, "sparse_queries"),
        ({"value_bits": 2.0}, "value_bits"),
        ({"value_bits": True}, "value_bits"),
        ({"profile": 3}, "profile must be the path"),
        ({"profile": b"file"}, "profile must be the path"),
        ({"offloading": 1}, "offloading"),
        ({"allow_untested": "no"}, "allow_untested"),
        ({"value_bits": 4}, "value_bits"),
        ({"prefill": "fast"}, "prefill must be one of"),
        ({"prefill": None}, "prefill must be one of"),
        ({"prefill_mass": 0}, "prefill_mass"),
        ({"prefill_mass": 1.5}, "prefill_mass"),
        ({"prefill_mass": True}, "prefill_mass"),
        ({"prefill_density": float("nan")}, "prefill_density"),
        ({"prefill_density": "10%"}, "prefill_density"),
        ({"preset": "paper", "value_bits": 3}, "paper"),
        ({"preset": "paper", "profile": "file"}, "profile"),
        ({"preset": "paper", "pinned_tokens": 8}, "its sinks"),
        ({"pinned_tokens": -1}, "pinned_tokens"),
        ({"pinned_tokens": 0.1}, "pinned_tokens"),
        ({"budgets": 3}, "unknown option budgets"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        SelfIndexConfig.make(**options)
    with pytest.raises(ConfigError, match=match):
        SelfIndexConfig.make(SelfIndexConfig(), **options)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("exact", {"prefill": "exact"}),
        ("sparse", {"prefill": "sparse"}),
        ("sparse=0.9", {"prefill": "sparse", "prefill_mass": 0.9}),
        ("sparse=10%", {"prefill": "sparse", "prefill_mass": 1.0, "prefill_density": 0.1}),
    ],
)
def test_prefill_as_typed(text, options):
    assert parse_prefill(text) == options


@pytest.mark.parametrize("text", ["", "fast", "exact=0.9", "sparse=", "sparse=some", "sparse=2", "sparse=0%"])
def test_prefill_that_is_none(text):
    with pytest.raises(ConfigError, match="prefill"):
        parse_prefill(text)


@pytest.mark.parametrize("budget", [0, 1.5, "all"])
def test_bad_budgets_are_refused_later_too(budget):
    from decoded_cache import small_cache

    cache = small_cache(pair("llama")[1], budget=7)
    with pytest.raises(ConfigError, match="budget"):
        cache.set_budget(budget)
    assert cache.config.budget == 7


def test_presets_have_their_own_windows():
    assert (SelfIndexConfig().sinks, SelfIndexConfig().recent) == (16, 64)
    paper = SelfIndexConfig(preset="paper")
    assert (paper.sinks, paper.recent) == (64, 0)
    assert SelfIndexConfig(preset="paper", sinks=3, recent=5).recent == 5


def test_options_override_a_config():
    config = SelfIndexConfig(budget=7, sinks=3)
    changed = SelfIndexConfig.make(config, budget=0.5)
    assert (changed.budget, changed.sinks, config.budget) == (0.5, 3, 7)


@pytest.mark.parametrize(
    "change",
    [
        lambda config, **options: SelfIndexConfig.make(config, **options),
        dataclasses.replace,
        lambda config, **options: dataclasses.replace(pickle.loads(pickle.dumps(config)), **options),
        lambda config, **options: dataclasses.replace(copy.deepcopy(config), **options),
    ],
    ids=["make", "replace", "pickled", "copied"],
)
@pytest.mark.parametrize("before", [{}, {"sinks": 16}, {"recent": 5}, {"preset": "paper"}, {"sinks": AUTO}])
@pytest.mark.parametrize(
    "options", [{"preset": "paper"}, {"preset": "balanced", "budget": 9}, {"sinks": AUTO}, {"recent": 2}]
)
def test_a_changed_config_is_what_a_new_one_would_be(change, before, options):
    changed, new = change(SelfIndexConfig(**before), **options), SelfIndexConfig(**(before | options))
    assert changed == new
    assert (changed.sinks, changed.recent) == (new.sinks, new.recent)
    # And so is the next change.
    assert dataclasses.replace(changed, preset="paper") == SelfIndexConfig(
        **(before | options | {"preset": "paper"})
    )


def test_a_new_budget_leaves_what_the_preset_chose_to_the_preset():
    cache = SelfIndexCache(pair("llama")[1], preset="paper")
    cache.set_budget(9)
    assert cache.config == SelfIndexConfig(preset="paper", budget=9)
    assert SelfIndexConfig.make(cache.config, preset="balanced") == SelfIndexConfig(budget=9)


def test_numbers_of_other_libraries_become_pythons():
    config = SelfIndexConfig(
        budget=np.int64(7), sinks=np.int32(3), page_size=np.int8(64), value_bits=np.uint8(3)
    )
    assert config == SelfIndexConfig(budget=7, sinks=3, page_size=64, value_bits=3)
    values = (config.budget, config.sinks, config.page_size, config.value_bits)
    assert [type(value) for value in values] == [int] * 4
    assert [type(SelfIndexConfig(budget=x).budget) for x in (np.float32(0.5), Fraction(1, 2))] == [float] * 2
    assert SelfIndexConfig(sinks=np.int64(AUTO)).sinks == 16


@pytest.mark.parametrize("config", ["paper", 0.05, {"budget": 3}, SelfIndexConfig])
def test_something_else_is_no_config(config):
    with pytest.raises(ConfigError, match="must be a SelfIndexConfig"):
        SelfIndexCache(pair("llama")[1], config)


def test_repr_shows_what_is_not_the_default_and_can_be_read_back():
    assert repr(SelfIndexConfig()) == "SelfIndexConfig()"
    assert repr(SelfIndexConfig(preset="paper")) == "SelfIndexConfig(preset='paper')"
    config = SelfIndexConfig(budget=7, sinks=16, recent=0, profile="a file")
    assert repr(config) == "SelfIndexConfig(budget=7, sinks=16, recent=0, profile='a file')"
    assert eval(repr(config)) == config


@given(
    st.one_of(st.integers(1, 5000), st.floats(0.001, 1.0)),
    st.integers(0, 500),
    st.integers(0, 2000),
    st.integers(0, 4000),
    st.integers(0, 400),
)
def test_budget_in_tokens(budget, min_tokens, dense_below, encoded, full):
    config = SelfIndexConfig(budget=budget, min_tokens=min_tokens, dense_below=dense_below)
    got = config.budget_tokens(encoded + full, encoded)
    assert 0 <= got <= encoded
    if encoded <= dense_below:
        assert got == encoded
    elif isinstance(budget, int):
        assert got == min(budget, encoded)
    else:
        assert got >= min(min_tokens, encoded)
        assert got >= min(budget * (encoded + full), encoded) - 1e-6
        assert got <= max(min_tokens, budget * (encoded + full) + 1)


def test_by_default_a_longer_row_never_reads_less():
    config = SelfIndexConfig()
    read = [config.budget_tokens(encoded + 80, encoded) for encoded in range(0, 40_000, 64)]
    assert read == sorted(read)
    assert read[-1] < 2100


def test_the_config_is_immutable():
    with pytest.raises(AttributeError):
        SelfIndexConfig().budget = 3


def test_the_config_serves_as_a_key():
    assert {SelfIndexConfig(): 1}[SelfIndexConfig(sinks=16)] == 1
    assert len({SelfIndexConfig(), SelfIndexConfig(preset="paper"), SelfIndexConfig(budget=0.06)}) == 3
