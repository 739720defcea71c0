"""What else the engine does: adapters, beams, logprobs, grammars, profiles, a cache that is emptied."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from serving.engines import DEVICE, make_model, make_writer, prompts, serving
from serving.policy import ENOUGH, MOST_EQUAL, Policy, Sequence, agreement

from selfindex.codec import BalanceProfile
from selfindex.config import SelfIndexConfig

OPTIONS = {"budget": 48, "dense_below": 128}
RANK, ALPHA = 8, 16
LOGPROB = 2e-3 if DEVICE == "cpu" else 1e-2
"""Largest difference of log-probabilities; a GPU multiplies matrices in an order of its own."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_adapter(model, folder):
    """Write an adapter in PEFT's format; the model with it."""
    merged, tensors, draw = copy.deepcopy(model), {}, torch.Generator().manual_seed(0)
    for i, layer in enumerate(merged.model.layers):
        for name in PROJECTIONS:
            weight = getattr(layer.self_attn, name).weight.data
            down = torch.randn(RANK, weight.shape[1], generator=draw) * 0.05
            up = torch.randn(weight.shape[0], RANK, generator=draw) * 0.05
            place = f"base_model.model.model.layers.{i}.self_attn.{name}"
            tensors |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
            weight += ALPHA / RANK * up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": list(PROJECTIONS), "base_model_name_or_path": ""}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def test_adapters_beside_requests_without(tmp_path):
    """The tokens are those of the model with the adapter's weights added, and of the model as it is."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = make_model("llama", tmp_path / "model")
    merged = make_adapter(model, tmp_path / "adapter")
    asked, adapter = prompts(300, 300, 500, 500), LoRARequest("tiny", 1, str(tmp_path / "adapter"))
    chosen = [adapter, None, adapter, None]
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
    # Of two places for adapters one stays empty: on a CPU vLLM 0.32 takes the last for requests without.
    lora = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    # Its kernels for adapters on a GPU take no float32.
    lora, enough = (lora, ENOUGH) if DEVICE == "cpu" else (lora | {"dtype": "float16"}, 0.9)
    with serving(tmp_path / "model", OPTIONS, enable_prefix_caching=True, **lora) as recorded:
        batch = [{"prompt_token_ids": ids} for ids in asked]
        outputs = recorded.engine.generate(batch, greedy, lora_request=chosen, use_tqdm=False)
        constants = recorded.constants()
    by_prompt = {tuple(x.prompt_token_ids): list(x.outputs[0].token_ids) for x in outputs}
    with_adapter = {tuple(ids) for ids, one in zip(asked, chosen, strict=True) if one is not None}
    for used, own in ((merged, True), (model, False)):
        names = {n: ids for n, ids in recorded.asked.items() if (tuple(ids) in with_adapter) == own}
        steps = [[row for row in step if row[0] in names] for step in recorded.steps]
        tokens = {n: by_prompt[tuple(ids)] for n, ids in names.items()}
        same, total = agreement(used, SelfIndexConfig(**OPTIONS), constants, names, steps, tokens)
        assert total == 48
        assert same >= enough * total
        other = model if own else merged
        assert agreement(other, SelfIndexConfig(**OPTIONS), constants, names, steps, tokens)[0] < 0.5 * total


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """An engine on a model with a tokenizer, with prefix caching."""
    folder = tmp_path_factory.mktemp("writer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFINDEX_CACHE", str(folder / "selfindex"))
        model = make_writer(folder / "model")
        with serving(
            folder / "model", OPTIONS, enable_prefix_caching=True, skip_tokenizer_init=False
        ) as recorded:
            yield recorded, model


@pytest.fixture
def engine(writer):
    """The engine, with an empty cache of prefixes, which only empties when nothing runs."""
    recorded, model = writer
    assert recorded.engine.reset_prefix_cache()
    recorded.forget()
    yield recorded, model
    assert recorded.used_blocks() == 0
    assert not recorded.held()


def test_a_cache_of_prefixes_can_be_emptied(engine):
    recorded, _ = engine
    (ids,) = prompts(300, vocab=200)
    first = recorded.generate([ids])
    assert recorded.engine.reset_prefix_cache()
    assert recorded.generate([ids]) == first
    assert set(recorded.begun().values()) == {0}
    recorded.generate([ids])
    assert sorted(recorded.begun().values()) == [0, 0, 256]


def test_logprobs_are_the_policys(engine):
    from vllm import SamplingParams

    recorded, model = engine
    (ids,) = prompts(400, seed=7, vocab=200)
    greedy = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (output,) = recorded.engine.generate({"prompt_token_ids": ids}, greedy, use_tqdm=False)
    assert len(output.prompt_logprobs) == len(ids)
    policy, sequence = Policy(model, SelfIndexConfig(**OPTIONS), recorded.constants()), Sequence(list(ids))
    (name,) = recorded.asked
    chosen = iter(output.outputs[0].logprobs)
    for _, computed, new in (row for step in recorded.steps for row in step if row[0] == name):
        policy.step(sequence, computed, new)
        if computed + new >= len(ids) and (found := next(chosen, None)):
            wanted = policy.logits.log_softmax(-1)
            for token, one in found.items():
                assert one.logprob == pytest.approx(float(wanted[token]), abs=LOGPROB)
            sequence.tokens[computed + new :] = [max(found, key=lambda token: found[token].logprob)]
    assert next(chosen, None) is None


def test_beams_share_a_prompt(engine):
    """One beam is the greedy continuation, request by request; more find one that is as likely or more."""
    from vllm.sampling_params import BeamSearchParams

    recorded, _ = engine
    (ids,) = prompts(300, seed=8, vocab=200)

    def beams(width):
        asked = BeamSearchParams(beam_width=width, max_tokens=6, ignore_eos=True)
        (found,) = recorded.engine.beam_search([{"prompt_token_ids": ids}], asked)
        return found.sequences

    (one,) = beams(1)
    tokens = list(ids)
    for _ in range(6):
        ((following,),) = recorded.generate([tokens], 1)
        tokens += following
    assert one.tokens == tokens
    several = beams(3)
    assert len(several) == 3
    assert len({tuple(beam.tokens) for beam in several}) == 3
    assert several[0].cum_logprob >= one.cum_logprob - 1e-3
    assert max(recorded.begun().values()) == 256


def test_a_grammar_holds(engine):
    from vllm.sampling_params import StructuredOutputsParams

    recorded, _ = engine
    (ids,) = prompts(300, seed=9, vocab=200)
    asked = {"structured_outputs": StructuredOutputsParams(regex="[a-c]{6}-[0-9]{4}"), "detokenize": True}
    ((tokens,),) = recorded.generate([ids], 16, ignore_eos=False, **asked)
    text = recorded.engine.get_tokenizer().decode(tokens, skip_special_tokens=True)
    assert re.fullmatch("[a-c]{6}-[0-9]{4}", text)


def test_a_profile_is_used(tmp_path):
    """What `selfindex profile` writes; nothing is measured at start."""
    model = make_writer(tmp_path / "model")
    text, profile = tmp_path / "text.txt", tmp_path / "profile.safetensors"
    text.write_text("A text of the kind that the model reads. " * 30)
    command = [sys.executable, "-m", "selfindex", "profile", str(tmp_path / "model"), "--file", str(text)]
    subprocess.run([*command, "-o", str(profile), "--device", "cpu"], check=True)
    options = OPTIONS | {"profile": str(profile)}
    with serving(tmp_path / "model", options) as recorded:
        (got,) = recorded.generate(prompts(400, vocab=200))
        constants = recorded.constants()
        tokens = dict(zip(recorded.asked, got, strict=True))
        config = SelfIndexConfig(**options)
        same, total = agreement(model, config, constants, recorded.asked, recorded.steps, tokens)
    assert same >= MOST_EQUAL * total
    balance = BalanceProfile.load(profile).balance
    assert all(constants[i][0].equal(balance[i]) for i in balance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM sleeps on a GPU only")
@pytest.mark.parametrize("level", [1])
def test_an_engine_that_slept(tmp_path, level):
    make_model("llama", tmp_path)
    asked = prompts(300, 640)
    with serving(tmp_path, OPTIONS, enable_sleep_mode=True) as recorded:
        first = recorded.generate(asked)
        recorded.engine.sleep(level=level)
        recorded.engine.wake_up()
        assert recorded.generate(asked) == first
