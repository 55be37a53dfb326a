#!/usr/bin/env bash
# All that one GPU can show, in one call of at most nine minutes, without a network:
#
#     bash benchmarks/gpu_lane.sh [OUTPUT] [WHEELS]      (OUTPUT: gpu_lane; WHEELS: a folder of wheels, for what is missing)
#     DRY_RUN=1 bash benchmarks/gpu_lane.sh              (on a CPU, with tiny models: does it run?)
#
# OUTPUT gets gpu_lane.json and gpu_lane.md: the hardware, the tests that need a GPU, the quickstart, whether runs are exact
# (twice, resumed, compiled, bf16, fp16 with skipped steps), the table of benchmark_gpu.py, and a profile of its best row.
set -euo pipefail
cd "$(dirname "$0")/.."
output=$(realpath -m "${1:-gpu_lane}")
wheels=${2:-}
mkdir -p "$output"
if [ -n "$wheels" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$output/site" "$wheels"/*.whl
    export PYTHONPATH="$output/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
exec python3 benchmarks/gpu_lane.py --output "$output" ${DRY_RUN:+--dry-run}
