"""Engines on tiny random models, with a record of the steps that their schedulers make."""

import gc
import os
import random
import string
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import transformers
from tiny_tokenizer import make_tokenizer

VOCAB = 800
STEPS_FILE = "SERVING_STEPS"
"""Environment variable that names the file to which the scheduler of a server writes its steps."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Read when vLLM is imported: one process, so that a test sees what the engine does.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
    # Peaked enough to tell tokens apart, smooth enough that rounding does not decide what comes next.
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}),
    "qwen2-96": ("Qwen2Config", {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 192}),
    "qwen3-128": ("Qwen3Config", {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 96,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 96,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


def make_model(name, folder, **changes):
    """Write a tiny random model to a folder, with some options of its own; the transformers model."""
    config_name, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**_COMMON | options | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):  # large enough to take a good part of the attention
            torch.nn.init.normal_(parameter, 4.0)
    model.save_pretrained(folder)
    return model


def make_writer(folder):
    """A tiny random model and a tokenizer of bytes in a folder, whose likeliest tokens are ASCII letters."""
    tokenizer = make_tokenizer()
    model = make_model("llama", folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    letters = tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
    others = [i for i in range(len(tokenizer)) if i not in letters]
    with torch.no_grad():
        model.lm_head.weight[others] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def prompts(*lengths, seed=0, shared=0, vocab=VOCAB):
    """Random token ids; the first `shared` of each prompt are the same."""
    draw = random.Random(seed)
    first = [draw.randrange(3, vocab) for _ in range(shared)]
    return [first + [draw.randrange(3, vocab) for _ in range(n - shared)] for n in lengths]


def step_rows(output):
    """(request, tokens computed before, new tokens) of every row of what a scheduler decided.

    No new tokens: the request was preempted, and what it had is gone but for pages that it finds again.
    """
    computed = {x.req_id: x.num_computed_tokens for x in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    again = [(name, computed[name], 0) for name in sorted(cached.resumed_req_ids)]
    return again + [(name, computed[name], new) for name, new in output.num_scheduled_tokens.items()]


@dataclass
class Recorded:
    """An engine and what its scheduler made of the requests.

    Attributes:
        steps: (request, tokens computed before, new tokens) of every row of every step.
        asked: prompts by request.
    """

    engine: object
    steps: list = field(default_factory=list)
    asked: dict = field(default_factory=dict)
    metrics: list = field(default_factory=list)

    @property
    def core(self):
        return self.engine.llm_engine.engine_core.engine_core

    @property
    def layers(self):
        """Attention layers and pseudo-layers by name."""
        runner = self.core.model_executor.driver_worker.worker.model_runner
        return runner.vllm_config.compilation_config.static_forward_context

    def constants(self):
        """What pages of every encoded layer refer to, by its number."""
        impls = {n: getattr(layer, "impl", None) for n, layer in self.layers.items()}
        return {int(n.split(".")[2]): x.constants.cpu() for n, x in impls.items() if hasattr(x, "constants")}

    def generate(self, asked, new=24, **options):
        """Greedy tokens of prompts, by request as the engine calls it."""
        from vllm import SamplingParams

        options = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True, "detokenize": False} | options
        batch = [{"prompt_token_ids": ids} for ids in asked]
        outputs = self.engine.generate(batch, SamplingParams(**options), use_tqdm=False)
        return [[list(one.token_ids) for one in output.outputs] for output in outputs]

    def metric(self, name):
        """Sum of a metric, also when the engine is gone."""
        if self.engine is not None:
            self.metrics = [(m.name, getattr(m, "value", 0) or 0) for m in self.engine.get_metrics()]
        return sum(value for found, value in self.metrics if found == f"vllm:{name}")

    def begun(self):
        """Tokens computed before a request's first step, which prefix caching found; by request.

        Older engines' own count of them leaves out steps that give no token.
        """
        found = {}
        for name, computed, _ in (row for step in self.steps for row in step):
            found.setdefault(name, computed)
        return found

    def forget(self):
        """Drop the record of the steps, with no request left."""
        self.steps.clear()
        self.asked.clear()

    def held(self):
        """Requests that the scheduler or a manager of blocks has not forgotten."""
        scheduler = self.core.scheduler
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        tables = [table for x in managers for table in (x.req_to_blocks, x.num_cached_block)]
        tables += [x._freed for x in managers if hasattr(x, "_freed")]
        return {name for table in (scheduler.requests, *tables) for name in table}

    def used_blocks(self):
        """Blocks that requests hold; those that only prefix caching remembers are free."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


@contextmanager
def serving(folder, selfindex, **options):
    """An engine with the cache's options; None for one without the cache."""
    from vllm import LLM

    chosen = {"attention_backend": "CUSTOM", "additional_config": {"selfindex": selfindex}}
    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "gpu_memory_utilization": 0.1,
    }
    if DEVICE == "cpu":
        del defaults["gpu_memory_utilization"]
    engine = LLM(str(folder), **defaults | (chosen if selfindex is not None else {}) | options)
    recorded = Recorded(engine)
    scheduler = recorded.core.scheduler
    schedule = scheduler.schedule

    def noting(*args, **kwargs):
        output = schedule(*args, **kwargs)
        recorded.steps.append(step_rows(output))
        for new in output.scheduled_new_reqs:
            recorded.asked.setdefault(new.req_id, list(scheduler.requests[new.req_id].prompt_token_ids))
        return output

    scheduler.schedule = noting
    try:
        yield recorded
    finally:
        recorded.metric("")
        engine.llm_engine.engine_core.shutdown()
        recorded.engine = engine = scheduler = schedule = None
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
