"""Options of an engine that serves with the cache, and what is refused, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...attention.attend import MOST_STEP_TOKENS
from ...codec.rotation import HEAD_DIMS
from ...config import SelfIndexConfig
from ...errors import ConfigError, UnsupportedModelError
from ...versions import vllm_problem, vllm_version
from .names import BACKEND, OPTION

DRAFTERS = ("ngram", "ngram_gpu", "suffix")
"""Speculative methods that keep nothing in the KV cache."""

HOW = '--attention-backend CUSTOM --additional-config \'{"selfindex": {"budget": 0.05}}\''


def serving_config(vllm_config: Any) -> SelfIndexConfig:
    """The cache's options that an engine was started with.

    Raises:
        ConfigError: there are none, or one is wrong.
    """
    given = (vllm_config.additional_config or {}).get(OPTION)
    if given is None:
        raise ConfigError(f"the attention backend CUSTOM is selfindex's here, start vLLM with {HOW}")
    if not isinstance(given, dict):
        raise ConfigError(
            f"additional_config[{OPTION!r}] must hold options by name, got {given!r}; as in {HOW}"
        )
    return SelfIndexConfig.make(**given)


def drafts(vllm_config: Any) -> int:
    """Most draft tokens of a request in a step."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens or 0)


def check(vllm_config: Any) -> None:
    """Refuse what cannot be served, and set what follows from the cache's options; changes nothing otherwise.

    Raises:
        ConfigError, UnsupportedModelError: the first of what is refused.
    """
    problem = vllm_problem(vllm_version())
    if problem is not None:
        raise ConfigError(problem)
    config = serving_config(vllm_config)
    for refused, error, sentence in _refusals(config, vllm_config):
        if refused:
            raise error(sentence)
    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    # Layers with a window of their own stay with the engine.
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not _checked(vllm_config):
        attention.backend_per_kind = {
            "full_attention": AttentionBackendEnum.CUSTOM
        } | attention.backend_per_kind
        attention.backend = None
        cache.block_size, cache.user_specified_block_size = config.page_size, True


def _checked(vllm_config: Any) -> bool:
    """Whether `check` has been here before: processes do so once more, when the engine has changed sizes."""
    return vllm_config.attention_config.backend is None


def _refusals(config: SelfIndexConfig, vllm_config: Any) -> Iterator[tuple[bool, type[Exception], str]]:
    """Whether something is refused, with what error, and why."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    chosen = attention.backend_per_kind.get("full_attention", attention.backend)
    yield chosen is not custom, ConfigError, f"selfindex is an attention backend that has to be chosen: {HOW}"
    yield (
        custom.get_path() != BACKEND,
        ConfigError,
        f"the attention backend CUSTOM is another plugin's ({custom.get_path()}); set VLLM_PLUGINS=selfindex",
    )
    yield from _option_refusals(config)
    yield (
        model.use_mla,
        UnsupportedModelError,
        "multi-head latent attention (MLA) keeps no keys per head that could be encoded; "
        "serve this model without selfindex",
    )
    yield (
        model.is_encoder_decoder or model.runner_type != "generate",
        UnsupportedModelError,
        "selfindex serves decoder-only models that generate, no encoder-decoder or pooling models",
    )
    size = model.get_head_size()
    yield (
        size not in HEAD_DIMS,
        UnsupportedModelError,
        f"head_dim {size} is not supported with selfindex; supported are {HEAD_DIMS}",
    )
    dtype = str(model.dtype).removeprefix("torch.")
    yield (
        cache.cache_dtype not in ("auto", dtype),
        ConfigError,
        f"--kv-cache-dtype {cache.cache_dtype}: selfindex encodes the cache itself, leave this out",
    )
    yield (
        cache.user_specified_block_size
        and not _checked(vllm_config)
        and cache.block_size != config.page_size,
        ConfigError,
        f"--block-size {cache.block_size} is not page_size {config.page_size}, leave it out",
    )
    yield (
        vllm_config.kv_transfer_config is not None or getattr(cache, "kv_offloading_size", None) is not None,
        ConfigError,
        "KV connectors do not know encoded pages: leave --kv-transfer-config and --kv-offloading-size out",
    )
    contexts = (getattr(parallel, f"{kind}_context_parallel_size", 1) for kind in ("decode", "prefill"))
    yield (
        any(size > 1 for size in contexts),
        ConfigError,
        "context parallelism is not supported with selfindex; use tensor parallelism",
    )
    yield (
        parallel.pipeline_parallel_size > 1,
        ConfigError,
        "pipeline parallelism is not supported with selfindex; use tensor parallelism",
    )
    yield (
        bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
        ConfigError,
        "selfindex needs the hybrid KV cache manager: leave --disable-hybrid-kv-cache-manager out",
    )
    yield (
        cache.mamba_block_size is not None or getattr(model, "is_hybrid", False),
        UnsupportedModelError,
        "models with recurrent layers (Mamba, linear attention) are not supported with selfindex yet",
    )
    yield from _draft_refusals(config, vllm_config)


def _option_refusals(config: SelfIndexConfig) -> Iterator[tuple[bool, type[Exception], str]]:
    """Options that mean something to `SelfIndexCache` only."""
    yield (
        config.prefill != "exact",
        ConfigError,
        "prefill='sparse' is not supported in vLLM, which reads prompts in chunks: leave it out",
    )
    yield config.offloading, ConfigError, "offloading is not supported in vLLM, whose pages stay on the GPU"
    yield (
        config.compile or not config.cuda_graphs,
        ConfigError,
        "compile and cuda_graphs are the engine's own options here: --compilation-config or --enforce-eager",
    )
    yield (
        config.sparse_queries > MOST_STEP_TOKENS,
        ConfigError,
        f"sparse_queries may be at most {MOST_STEP_TOKENS} in vLLM, got {config.sparse_queries}",
    )
    yield (
        config.page_size % 16 != 0 or config.page_size < 32,
        ConfigError,
        f"page_size is a block in vLLM and must be a multiple of 16 from 32 on, got {config.page_size}",
    )
    yield (
        config.pinned_tokens > 0,
        ConfigError,
        "pinned_tokens is not supported in vLLM, where requests share pages: leave it out",
    )
    yield (
        config.sinks > config.page_size // 2,
        ConfigError,
        f"sinks may be at most half a page ({config.page_size // 2}) in vLLM, got {config.sinks}",
    )


def _draft_refusals(config: SelfIndexConfig, vllm_config: Any) -> Iterator[tuple[bool, type[Exception], str]]:
    speculative, most = vllm_config.speculative_config, min(config.recent, config.page_size // 2 - 1)
    method = None if speculative is None else speculative.method
    yield (
        method is not None and method not in DRAFTERS,
        ConfigError,
        f"speculative method {method!r} keeps a cache of its own; with selfindex use one of {DRAFTERS}",
    )
    yield (
        drafts(vllm_config) > most,
        ConfigError,
        f"num_speculative_tokens is {drafts(vllm_config)}, recent={config.recent} serves at most {most}",
    )
