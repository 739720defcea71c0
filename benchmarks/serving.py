"""Capacity and speed of vLLM with this cache, and with its own bf16 and fp8 caches.

    python benchmarks/serving.py --output serving.json [--caches bf16 fp8 selfindex]
        [--parts single saturated mixed] [--lengths 2048 8192 32768 131072]
        [--saturate 32768:512 131072:512] [--mixed 0.4:60]

Llama-3.1-8B's shapes with random weights, made in a temporary folder; no network. Every cache and part gets
a process and an engine of its own, so that they can run in calls of their own, or on GPUs of their own
(through CUDA_VISIBLE_DEVICES): benchmarks/report.py merges the files. Measured are
  - tokens that the cache holds, as the engine counts them;
  - single: for each length, one request: time to first token, and milliseconds for each further one;
  - saturated: for each PROMPT:STEPS, as many requests as the engine says fit, --most, or as many as are
    read within --fill-seconds. When all of them decode, so many steps are timed; then requests are dropped
    by halves, and fewer steps are timed, down to one request: tokens/s against requests in flight;
  - mixed: for each RATE:REQUESTS, `vllm serve` under `vllm bench serve`: Poisson arrivals, RATE a second on
    average, prompts of 2k to 64k tokens (uniform), 256 new ones each.
Prompts are random tokens of their own, no two of which begin alike, and prefix caching is off: nothing is
read from a cache that was not computed for the request, which is checked. Decode steps run as CUDA graphs,
without torch.compile. Baselines use FlashAttention. Making the outputs is part of a step, for all caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evals.server import CACHES, QUIET

LONGEST = 131072 + 8192
"""Tokens of a sequence: the longest prompt, and what is decoded while others are read."""
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
ENVIRONMENT = QUIET | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
PARTS = ("single", "saturated", "mixed")


def main() -> None:
    """Measure all caches, or, in a process started for it, one part of one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--caches", nargs="+", default=list(CACHES), choices=list(CACHES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--saturate", nargs="+", default=["32768:512", "131072:512"], metavar="PROMPT:STEPS")
    parser.add_argument("--mixed", nargs="+", default=["0.4:60"], metavar="RATE:REQUESTS")
    parser.add_argument("--mixed-lengths", type=int, nargs=2, default=[2048, 65536], metavar=("LOW", "HIGH"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--model", help="folder of another model, with weights or without; for small trials")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.92, help="share of the GPU's memory")
    parser.add_argument("--most", type=int, default=160, help="requests at once at most")
    parser.add_argument("--fill-seconds", type=float, default=240, help="for reading prompts, at most")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step at most")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments)
    else:
        run_all(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Every cache and part in a process of its own; one that fails is reported, and the others go on."""
    from decode_attention import environment

    failed: list[str] = []
    results: dict[str, dict[str, Any]] = {}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("output", "one", "model")}
    for name in arguments.caches:
        for part in arguments.parts:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "result.json"
                command = [
                    sys.executable,
                    __file__,
                    *sys.argv[1:],
                    "--one",
                    name,
                    part,
                    "--output",
                    str(file),
                ]
                status = subprocess.run(command, env=ENVIRONMENT | os.environ).returncode
                if file.exists():
                    results[name] = results.get(name, {}) | json.loads(file.read_text())
                if status:
                    failed.append(f"{name} {part}")
            found = {"environment": environment(), "settings": settings, "results": results, "failed": failed}
            arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print("prompts share no prefix, prefix caching is off")
    for name, result in results.items():
        print(summary(name, result))
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def summary(name: str, result: dict[str, Any]) -> str:
    """What was measured with one cache, in words."""
    held = f", capacity {result['capacity']:,} tokens" if "capacity" in result else ""
    lines = [f"{name}: vLLM {result['vllm']}{held}"]
    for row in result.get("single", ()):
        lines.append(
            f"  1 x {row['length']}: first token {row['first_ms']:.0f} ms, {row['step_ms']:.2f} ms a token"
        )
    for row in result.get("saturated", ()):
        lines.append(
            f"  {row['requests']} x {row['prompt']} ({row['fit']} fit, {row['preemptions']} preempted): "
            f"{row['decode_tokens_per_s']:,.0f} tokens/s decoding ({row['step_ms']:.2f} ms a step, "
            f"{row['full_steps']} steps), read in {row['fill_s']:.0f} s"
        )
        flight = [f"{some['requests']}: {some['tokens_per_s']:,.0f}" for some in row["flight"]]
        lines.append(f"    tokens/s by requests in flight: {', '.join(flight)}")
    for row in result.get("mixed", ()):
        lines.append(
            f"  {row['rate']}/s, {row['completed']} requests: first token {row['ttft_ms'][0]:.0f} ms "
            f"(p99 {row['ttft_ms'][1]:.0f}), between tokens {row['itl_ms'][0]:.1f} ms "
            f"(p99 {row['itl_ms'][1]:.0f}), {row['tokens_per_s']:.0f} tokens/s, "
            f"{row['preemptions']:.0f} preempted"
        )
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    """One part of one cache, written to the output after every measurement."""
    part = arguments.one[1]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(arguments.model or made)
        if arguments.model is None:
            config = LLAMA | {"num_hidden_layers": arguments.layers}
            (folder / "config.json").write_text(json.dumps(config))
        if part == "mixed":
            from serving_load import mixed

            rows = mixed(folder, options(folder, arguments), Path(made), arguments)
        else:
            # The engine's steps are timed in this process; workers of several GPUs have their own.
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            from serving_engine import rows_of

            rows = rows_of(part, str(folder), options(folder, arguments), arguments)
        import vllm

        result: dict[str, Any] = {"vllm": vllm.__version__}
        for facts, row in rows:
            result |= facts
            result[part] = [*result.get(part, ()), *([row] if row else [])]
            arguments.output.write_text(json.dumps(result))


def options(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of the engine, in Python as for `vllm serve`."""
    config = json.loads((folder / "config.json").read_text())
    sizes = sorted({1, 2, 4, *range(8, arguments.most + 1, 8), arguments.most})
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    return {
        "load_format": "auto" if list(folder.glob("*.safetensors")) else "dummy",
        "dtype": "bfloat16",
        "max_model_len": min(LONGEST, config["max_position_embeddings"]),
        "max_num_batched_tokens": arguments.chunk,
        "max_num_seqs": arguments.most,
        "gpu_memory_utilization": arguments.memory,
        "tensor_parallel_size": arguments.tensor_parallel,
        "compilation_config": {"mode": 0} if arguments.eager else graphs,
        "seed": 0,
        **CACHES[arguments.one[0]],
    } | ({"enforce_eager": True} if arguments.eager else {})


if __name__ == "__main__":
    main()
