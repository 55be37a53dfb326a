#!/usr/bin/env bash
# bash launch/torchrun.sh --config configs/sd15_finetune.yaml --data.dataset path/to/images
#
# One machine that nobody watches: a process on each of its GPUs (PROCESSES=2 for another number). Where one dies or hangs,
# all are started again, up to RESTARTS times (3), and go on from the newest checkpoint.
#
# Tried: two and four processes on a CPU (ACCELERATE_USE_CPU=true PROCESSES=2), of which one is killed. Not tried: GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-gpu}" \
    --max-restarts "${RESTARTS:-3}" train_text_to_image.py --resume-from latest "$@"
