#!/usr/bin/env bash
# bash configs/experiments/run_all.sh
#
# Every experiment with three seeds, one after another, and then the table of docs/strategies.md. It takes 75 minutes on
# one CPU core, and goes on where it stopped.
set -euo pipefail
for seed in 0 1 2; do
    for path in configs/experiments/*.yaml; do
        run=runs/experiments/$(basename "$path" .yaml)-$seed
        [ -e "$run/pipeline" ] || accelerate launch train_text_to_image.py --config configs/quickstart.yaml \
            --config configs/experiments/baseline.yaml --config "$path" --train.seed "$seed" --output-dir "$run"
    done
done
difftrain compare runs/experiments/* --output runs/experiments.html
