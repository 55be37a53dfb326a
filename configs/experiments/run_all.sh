#!/usr/bin/env bash
# bash configs/experiments/run_all.sh [NAME ...]
#
# Every experiment (or those named) with five seeds. Then `difftrain compare runs/experiments/* --baseline baseline` is
# the table of docs/strategies.md. A run takes two minutes on one CPU core; it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
names=("$@")
((${#names[@]})) || names=($(basename -s .yaml configs/experiments/*.yaml))
for seed in 0 1 2 3 4; do
    for name in "${names[@]}"; do
        run=runs/experiments/$name-$seed
        [ -e "$run/pipeline" ] || accelerate launch train_text_to_image.py --config configs/quickstart.yaml \
            --config configs/experiments/baseline.yaml --config "configs/experiments/$name.yaml" \
            --train.seed "$seed" --output-dir "$run"
    done
done
