"""Tiny random models of every supported family, and a forward call that suits every transformers version."""

import copy
import inspect
from functools import lru_cache

import backends
import torch
import transformers

VOCAB = 96

# family: (config class, heads, KV heads, head_dim, further options). Together they cover MHA, MQA
# and GQA, every supported head_dim but 192, QK norms, NoPE layers, experts, sinks and hybrids.
_HYBRID = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 16,
}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32}
SPECS = {
    "llama": ("LlamaConfig", 4, 2, 64, {}),
    "mistral": ("MistralConfig", 4, 1, 80, {"sliding_window": None}),
    "qwen2": ("Qwen2Config", 2, 1, 96, {"hidden_size": 192}),
    "qwen3": ("Qwen3Config", 4, 2, 128, {}),
    "qwen3_moe": ("Qwen3MoeConfig", 4, 2, 64, _EXPERTS),
    "phi3": ("Phi3Config", 2, 2, 96, {"hidden_size": 192, "partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3Config", 4, 2, 64, {"no_rope_layer_interval": 2, "hidden_size": 256}),
    "olmo": ("OlmoConfig", 2, 2, 64, {"hidden_size": 128}),
    "olmo2": ("Olmo2Config", 2, 1, 64, {"hidden_size": 128}),
    "olmo3": ("Olmo3Config", 2, 1, 64, {"hidden_size": 128} | _HYBRID),
    "gemma3": ("Gemma3TextConfig", 2, 1, 256, _HYBRID | {"query_pre_attn_scalar": 256}),
    "gpt_oss": ("GptOssConfig", 4, 2, 64, _EXPERTS | _HYBRID),
}
FAMILIES = tuple(SPECS)
HYBRIDS = ("olmo3", "gemma3", "gpt_oss")


def make_config(family, **options):
    name, heads, kv_heads, head_dim, special = SPECS[family]
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        # Large enough that attention is peaked: with the default, every token gets equal weight.
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return getattr(transformers, name)(**(values | special | options))


def make_model(family, seed=0, dtype=torch.float32, attention="sdpa", **options):
    """A fresh model; same arguments, same weights."""
    torch.manual_seed(seed)
    config = make_config(family, **options)
    if family == "gpt_oss":
        attention = "eager"  # its sinks are not implemented for sdpa
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.normal_(std=2.0)
    return model.to(dtype).eval()


def pair(family, **options):
    """(untouched model, equal model for the cache) on the backend's device, shared between tests."""
    return _pair(family, backends.current.device, **options)


@lru_cache(maxsize=32)
def _pair(family, device, **options):
    model = make_model(family, **options).to(device)
    return model, copy.deepcopy(model)


def device_of(model):
    """Where a model, wrapped or not, is."""
    return next(model.parameters()).device


def _move(tensors, device):
    """The options of a call, tensors with data among them on a device with memory."""
    moved = {
        name: x.to(device)
        for name, x in tensors.items()
        if isinstance(x, torch.Tensor) and not x.is_meta and device.type != "meta"
    }
    return tensors | moved


def cache_argument(model):
    """Name of the cache argument: transformers 5.24 renamed `past_key_values` to `cache`."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@torch.no_grad()
def forward(model, ids, cache=None, mask=None, **options):
    """Logits of one forward pass; tensors are taken and given where the ids are."""
    given = _move({"input_ids": ids, "attention_mask": mask, **options}, device_of(model))
    if cache is not None:
        given[cache_argument(model)] = cache
    return model(use_cache=True, **given).logits.to(ids.device)


def generate(model, ids, cache=None, **options):
    """Greedy generation unless told otherwise; never stops early unless told to."""
    if cache is not None:
        options[cache_argument(model)] = cache
    if ids is not None:
        # Left to itself, `generate` takes a generated token 0 of an earlier turn for padding.
        options = {"attention_mask": torch.ones_like(ids)} | options
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": VOCAB, "pad_token_id": 0} | options
    device = "cpu" if ids is None else ids.device
    there = device_of(model)
    out = model.generate(None if ids is None else ids.to(there), **_move(options, there))
    if isinstance(out, torch.Tensor):
        return out.to(device)
    for name, tensor in _move({k: v for k, v in out.items() if isinstance(v, torch.Tensor)}, device).items():
        out[name] = tensor
    return out


def prompt(tokens, batch=1, seed=0):
    """Random token ids [batch, tokens] without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)
