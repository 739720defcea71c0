#!/usr/bin/env bash
# vLLM on a machine with a GPU, which must have vllm (0.26 was tried) and selfindex's CUDA parts installed.
#   scripts/serving_gpu.sh [tests] [smoke] [soak] [benchmark] [quality]     (tests and smoke without arguments)
# OUT: folder of results and logs (default: serving_gpu). PYTHON: interpreter. MODEL_LAYERS: of the smoke run.
# SOAK: seconds of random load (default: 600). CACHE: of the benchmark, bf16, fp8 or selfindex (default: all), for
# which BENCHMARK holds further options; a call for each cache, with its own OUT and CUDA_VISIBLE_DEVICES, fills as
# many GPUs. MODEL: folder, SERVED: options of `python -m evals.served` for the part quality. To publish:
# cp OUT/serving-CACHE.json benchmarks/results/serving-CACHE-h200.json, then python benchmarks/report.py.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-serving_gpu} python=${PYTHON:-python3} failed=0
mkdir -p "$out"
export PYTHONUNBUFFERED=1 VLLM_NO_USAGE_STATS=1
if ! "$python" -c 'from selfindex.integrations.vllm.plugin import state; ok, why = state(); raise SystemExit(0 if ok else why)' 2>/dev/null; then
  # Not installed as a package: a folder with the entry point in front of the sources does as well.
  shim="$out/plugin"
  "$python" - "$shim" <<'PY'
import sys, pathlib
folder = pathlib.Path(sys.argv[1]) / "selfindex_plugin-0.dist-info"
folder.mkdir(parents=True, exist_ok=True)
(folder / "METADATA").write_text("Metadata-Version: 2.1\nName: selfindex_plugin\nVersion: 0\n")
(folder / "entry_points.txt").write_text("[vllm.general_plugins]\nselfindex = selfindex.integrations.vllm.plugin:register\n")
PY
  export PYTHONPATH="$PWD/src:$(cd "$shim" && pwd)${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -c 'from selfindex.integrations.vllm.plugin import state; print(*state())'
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests smoke)

for part in "${parts[@]}"; do
  case $part in
    tests) "$python" -m pytest tests/serving -n 0 -p no:cacheprovider 2>&1 | tee "$out/tests.log" || failed=1 ;;
    smoke)
      "$python" benchmarks/serving.py --caches selfindex --layers "${MODEL_LAYERS:-4}" --parts single saturated \
        --lengths 2048 8192 --saturate 8192:64 --most 16 --eager --output "$out/smoke-eager.json" 2>&1 | tee "$out/smoke-eager.log" || failed=1
      "$python" benchmarks/serving.py --caches selfindex bf16 --layers "${MODEL_LAYERS:-4}" --parts single saturated \
        --lengths 2048 8192 --saturate 8192:64 --most 16 --output "$out/smoke.json" 2>&1 | tee "$out/smoke.log" || failed=1 ;;
    soak)
      "$python" scripts/serving_soak.py --seconds "${SOAK:-600}" 2> "$out/soak.log" | tail -1 | tee "$out/soak.json" || failed=1 ;;
    benchmark)
      # shellcheck disable=SC2086 # several words
      "$python" benchmarks/serving.py ${CACHE:+--caches "$CACHE"} ${BENCHMARK:-} \
        --output "$out/serving${CACHE:+-$CACHE}.json" 2>&1 | tee "$out/serving${CACHE:+-$CACHE}.log" || failed=1 ;;
    quality)
      # shellcheck disable=SC2086
      "$python" -m evals.served "${MODEL:?folder of a model}" --out "$out" ${SERVED:-} --output "$out/served.json" 2>&1 |
        tee "$out/served.log" || failed=1 ;;
    *)
      echo "unknown part '$part'; parts are tests, smoke, soak, benchmark, quality" >&2; exit 2 ;;
  esac
done
exit $failed
