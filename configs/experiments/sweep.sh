#!/usr/bin/env bash
# bash configs/experiments/sweep.sh [NAME ...]
#
# Every experiment (or those named) at five learning rates, with a seed that run_all.sh does not use, and then the
# validation losses by which each experiment's learning rate was chosen. It goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
names=("$@")
((${#names[@]})) || names=($(basename -s .yaml configs/experiments/*.yaml))
for name in "${names[@]}"; do
    for lr in 1e-3 2e-3 4e-3 8e-3 1.6e-2; do
        run=runs/sweep/$name-$lr
        [ -e "$run/pipeline" ] || accelerate launch train_text_to_image.py --config configs/quickstart.yaml \
            --config configs/experiments/baseline.yaml --config "configs/experiments/$name.yaml" \
            --optimizer.init_args.lr "$lr" --train.seed 100 --output-dir "$run"
    done
    difftrain compare runs/sweep/"$name"-* --baseline "$name-1e-3"
done
