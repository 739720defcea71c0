"""Capacity and speed of vLLM with this cache, and with its own bf16 and fp8 caches.

    python benchmarks/serving.py --output serving.json [--lengths 2048 8192 32768 130048]
        [--saturate 32768:256 130048:256] [--caches bf16 fp8 selfindex] [--layers 32] [--tensor-parallel 1]

Llama-3.1-8B's shapes with random weights, made in a temporary folder; no network, no tokenizer. Every cache
gets a process and an engine of its own. Measured are
  - tokens that the cache holds, as the engine counts them;
  - for each length, one request: time to first token, and milliseconds for each further one;
  - for each PROMPT:NEW of --saturate, as many requests as the cache holds: tokens/s of the steps in which
    all of them decode, and of all new tokens over the whole time.
Decode steps run as CUDA graphs, without torch.compile. Baselines use FlashAttention.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHES: dict[str, dict[str, Any]] = {
    "bf16": {"attention_backend": "FLASH_ATTN"},
    "fp8": {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    "selfindex": {"attention_backend": "CUSTOM", "additional_config": {"selfindex": {"budget": 0.05}}},
}
LONGEST = 131072
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
STEPS = 64
"""New tokens of a request that is measured alone."""


def main() -> None:
    """Measure all caches, or, in a process started for it, one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=list(CACHES))
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192, 32768, 130048])
    parser.add_argument("--saturate", nargs="*", default=["32768:256"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.92, help="share of the GPU's memory")
    parser.add_argument("--most", type=int, default=64, help="requests at once at most")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step at most")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments)
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Every cache in a process of its own; one that fails is reported, and the others go on."""
    from decode_attention import environment

    results, failed = {}, []
    for name in arguments.caches:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "result.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--output", str(part)]
            status = subprocess.run(command, env=ENVIRONMENT | os.environ).returncode
            if part.exists():
                results[name] = json.loads(part.read_text())
            if status:
                failed.append(name)
        settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "one")}
        found = {"environment": environment(), "settings": settings, "results": results, "failed": failed}
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    for name, result in results.items():
        print(summary(name, result))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def summary(name: str, result: dict[str, Any]) -> str:
    """What was measured with one cache, in words."""
    lines = [f"{name}: vLLM {result['vllm']}, capacity {result['capacity']:,} tokens"]
    for row in result.get("single", ()):
        lines.append(
            f"  1 x {row['length']}: first token {row['first_ms']:.0f} ms, {row['step_ms']:.2f} ms a token"
        )
    for row in result.get("saturated", ()):
        lines.append(
            f"  {row['requests']} x {row['prompt']}+{row['new']}: {row['decode_tokens_per_s']:,.0f} tokens/s "
            f"decoding ({row['step_ms']:.2f} ms a step), {row['tokens_per_s']:,.0f} over all"
        )
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    """Start one engine and write what it does to the output, after every measurement."""
    with tempfile.TemporaryDirectory() as folder:
        config = LLAMA | {"num_hidden_layers": arguments.layers}
        Path(folder, "config.json").write_text(json.dumps(config))
        # The engine's counts can be asked for in this process; workers of several GPUs have their own.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        start = time.perf_counter()
        engine = make_engine(folder, arguments)
        import vllm

        result: dict[str, Any] = {
            "vllm": vllm.__version__,
            "capacity": capacity(engine),
            "start_s": time.perf_counter() - start,
            "single": [],
            "saturated": [],
        }
        save(arguments.output, result)
        for length in arguments.lengths:
            result["single"].append(single(engine, length))
            save(arguments.output, result)
        for pair in arguments.saturate:
            prompt, new = map(int, pair.split(":"))
            requests = min(arguments.most, result["capacity"] // (prompt + new))
            result["saturated"].append(saturated(engine, prompt, new, max(1, requests)))
            save(arguments.output, result)


def save(path: Path, result: dict[str, Any]) -> None:
    """Write what there is so far."""
    path.write_text(json.dumps(result))


def make_engine(folder: str, arguments: argparse.Namespace) -> Any:
    """The engine of one cache."""
    from vllm import LLM

    sizes = sorted({1, 2, 4, *range(8, arguments.most + 1, 8), arguments.most})
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    return LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=LONGEST,
        max_num_batched_tokens=arguments.chunk,
        max_num_seqs=arguments.most,
        gpu_memory_utilization=arguments.memory,
        enable_prefix_caching=False,
        tensor_parallel_size=arguments.tensor_parallel,
        enforce_eager=arguments.eager,
        compilation_config={"mode": 0} if arguments.eager else graphs,
        seed=0,
        **CACHES[arguments.one],
    )


def capacity(engine: Any) -> int:
    """Tokens that the cache holds, as the engine prints it."""
    config = engine.llm_engine.vllm_config
    known = getattr(config.cache_config, "kv_cache_size_tokens", None)
    if known:
        return int(known)
    core = engine.llm_engine.engine_core.engine_core
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    return int(get_kv_cache_capacity(config, core.scheduler.kv_cache_config)[0])


def run(engine: Any, requests: int, prompt: int, new: int) -> tuple[float, float, list[tuple[float, int]]]:
    """(seconds, seconds until all had a first token, [(seconds of a step, requests that got a token)])."""
    from vllm import SamplingParams

    draw = random.Random(0)
    parameters = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    core, seen, steps, first = engine.llm_engine, set(), [], 0.0
    for i in range(requests):
        tokens = [draw.randrange(1000, 100000) for _ in range(prompt)]
        core.add_request(f"{time.perf_counter()}-{i}", {"prompt_token_ids": tokens}, parameters)
    start = last = time.perf_counter()
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter()
        steps.append((now - last, len(outputs)))
        last = now
        seen |= {output.request_id for output in outputs}
        if len(seen) == requests and not first:
            first = now - start
    return last - start, first, steps


def single(engine: Any, length: int) -> dict[str, Any]:
    """One request, the best of three."""
    run(engine, 1, length, 4)
    rows = []
    for _ in range(3):
        whole, first, _ = run(engine, 1, length, STEPS)
        rows.append((first, (whole - first) / (STEPS - 1)))
    first, step = (min(column) for column in zip(*rows, strict=True))
    return {"length": length, "first_ms": first * 1e3, "step_ms": step * 1e3}


def saturated(engine: Any, prompt: int, new: int, requests: int) -> dict[str, Any]:
    """So many requests at once; prompts are computed chunk by chunk before all of them decode."""
    whole, first, steps = run(engine, requests, prompt, new)
    full = [seconds for seconds, served in steps if served == requests]
    step = statistics.median(full) if full else float("nan")
    return {
        "prompt": prompt,
        "new": new,
        "requests": requests,
        "first_s": first,
        "full_steps": len(full),
        "step_ms": step * 1e3,
        "decode_tokens_per_s": requests / step,
        "tokens_per_s": requests * new / whole,
    }


if __name__ == "__main__":
    main()
