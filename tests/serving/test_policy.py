"""Tokens of the engine against the same policy without an engine, sequence by sequence."""

import pytest
from serving.engines import make_model, prompts, serving
from serving.policy import ENOUGH, MOST_EQUAL, agreement

from selfindex.config import SelfIndexConfig

OPTIONS = {"budget": 48, "dense_below": 128}


def shared_tokens(model, recorded, got, options):
    """Share of the engine's tokens [request] that the policy chooses too."""
    tokens = dict(zip(recorded.asked, got, strict=True))
    config = SelfIndexConfig(**options)
    same, total = agreement(model, config, recorded.constants(), recorded.asked, recorded.steps, tokens)
    return same / total


def check(folder, name, asked, new=24, options=OPTIONS, enough=ENOUGH, **engine):
    """Generate in one batch, and compare; the record of the engine."""
    model = make_model(name, folder)
    with serving(folder, options, **engine) as recorded:
        by_prompt = {
            tuple(ids): one for ids, (one,) in zip(asked, recorded.generate(asked, new), strict=True)
        }
        got = [by_prompt[tuple(ids)] for ids in recorded.asked.values()]
        assert shared_tokens(model, recorded, got, options) >= enough
        assert recorded.used_blocks() == 0
    return recorded


@pytest.mark.parametrize("name", ["llama", "qwen2-96", "qwen3-128", "gemma3", "gpt-oss"])
def test_batches_of_prompts_and_steps(name, tmp_path):
    """Prompts of very different lengths, some longer than a step takes, while others decode."""
    check(tmp_path, name, prompts(5, 127, 128, 300, 700, 901), max_num_batched_tokens=256)


@pytest.mark.parametrize("name", ["llama", "qwen2-96", "qwen3-128", "gemma3"])
def test_pages_of_the_paper_preset(name, tmp_path):
    """Statistics are the model's, and the first tokens are in full precision, as pages are shared."""
    options = OPTIONS | {"preset": "paper"}
    asked = prompts(5, 127, 128, 300, 700, 901)
    check(tmp_path, name, asked, new=60, options=options, enough=MOST_EQUAL, max_num_batched_tokens=256)


def test_statistics_are_kept_and_prefixes_shared_by_the_paper_preset(tmp_path, monkeypatch):
    model, options, asked = make_model("llama", tmp_path), OPTIONS | {"preset": "paper"}, []
    monkeypatch.setenv("SELFINDEX_CACHE", str(tmp_path / "selfindex"))
    for _ in range(2):
        with serving(tmp_path, options, enable_prefix_caching=True) as recorded:
            asked.append(recorded.constants())
            got = [one for _ in range(2) for (one,) in recorded.generate(prompts(420, 500, shared=400))]
            assert shared_tokens(model, recorded, got, options) >= ENOUGH
            assert sum(recorded.begun().values()) >= 384 + 2 * 384
        (kept,) = (tmp_path / "selfindex" / "statistics").iterdir()
    written = kept.stat().st_mtime_ns
    assert all(asked[0][i].equal(asked[1][i]) for i in asked[0])
    assert asked[0][0].shape == (1, 2, 18 * 64)
    kept.write_bytes(b"damaged")
    with serving(tmp_path, options) as recorded:
        assert all(x.equal(asked[0][i]) for i, x in recorded.constants().items())
    assert kept.stat().st_mtime_ns > written
    assert kept.stat().st_size > 1000


def test_chunks_that_begin_with_the_last_block_of_a_page(tmp_path):
    """Such a block is all of the chunk, which may not store it; it is no sign of a prefix hit."""
    model, asked = make_model("llama", tmp_path), prompts(700)
    with serving(tmp_path, OPTIONS, max_num_batched_tokens=248) as recorded:
        sizes = {x.spec.block_size for name, x in recorded.layers.items() if name.endswith(".window")}
        assert sizes == {128 - 248 % 128}
        got = [one for (one,) in recorded.generate(asked, 40)]
        assert shared_tokens(model, recorded, got, OPTIONS) >= ENOUGH


def test_every_token_selects_from_few(tmp_path):
    options = {"budget": 0.05, "min_tokens": 16, "dense_below": 0, "recent": 0, "sinks": 4}
    check(tmp_path, "llama", prompts(300, 640), options=options)


def test_pages_that_steps_complete_are_read(tmp_path):
    """So many steps that pages they fill, a row's first one as well, leave the window."""
    options = {"budget": 0.1, "min_tokens": 16, "dense_below": 0, "recent": 0, "sinks": 4}
    check(tmp_path, "llama", prompts(5, 100, 250), new=170, options=options)


def test_preempted_requests_are_computed_again(tmp_path):
    recorded = check(tmp_path, "llama", prompts(*[300] * 6), new=60, num_gpu_blocks_override=150)
    assert recorded.metric("num_preemptions") > 0


def test_prefixes_are_shared(tmp_path):
    """Also between requests that come together: the second reads pages of the step that fills them."""
    asked = prompts(420, 500, 640, shared=400)
    model = make_model("llama", tmp_path)
    with serving(tmp_path, OPTIONS, enable_prefix_caching=True) as recorded:
        got = [one for _ in range(2) for (one,) in recorded.generate(asked)]
        assert shared_tokens(model, recorded, got, OPTIONS) >= ENOUGH
        assert sum(recorded.begun().values()) >= 2 * 384 + 3 * 384


def test_several_answers_to_a_prompt(tmp_path):
    """They share the prompt's pages; each of them is the likeliest."""
    make_model("llama", tmp_path)
    with serving(tmp_path, OPTIONS, enable_prefix_caching=True) as recorded:
        (several,) = recorded.generate(prompts(300), n=3, temperature=1.0, top_k=1)
        assert sum(recorded.begun().values()) >= 2 * 256
        assert recorded.used_blocks() == 0
    assert several[1] == several[2]  # the first computed the prompt, and read none of its pages


def test_drafts_change_no_token(tmp_path):
    make_model("llama", tmp_path)
    asked = [(ids * 40)[:n] for ids, n in zip(prompts(9, 9, 9), (127, 300, 640), strict=True)]
    drafter = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with serving(tmp_path, OPTIONS) as recorded:
        wanted = recorded.generate(asked, 150)
    with serving(tmp_path, OPTIONS, speculative_config=drafter) as recorded:
        assert recorded.generate(asked, 150) == wanted
        assert recorded.metric("spec_decode_num_accepted_tokens") > 0
