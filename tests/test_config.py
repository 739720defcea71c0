import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import pair

from selfindex import ConfigError, SelfIndexConfig


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
        ({"preset": "best"}, "preset must be one of"),
        ({"sinks": -2}, "sinks"),
        ({"recent": 1.5}, "recent"),
        ({"recent": True}, "recent"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"dense_below": -1}, "dense_below"),
        ({"sparse_queries": "8"}, "sparse_queries"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": 12}, "page_size"),
        ({"page_size": 64.0}, "page_size"),
        ({"value_bits": 4}, "value_bits"),
        ({"preset": "paper", "value_bits": 3}, "paper"),
        ({"preset": "paper", "profile": "file"}, "profile"),
        ({"budgets": 3}, "unknown option budgets"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        SelfIndexConfig.make(**options)
    with pytest.raises(ConfigError, match=match):
        SelfIndexConfig.make(SelfIndexConfig(), **options)


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


def test_the_config_is_immutable():
    with pytest.raises(AttributeError):
        SelfIndexConfig().budget = 3
