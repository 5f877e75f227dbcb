#!/usr/bin/env bash
# Train a recipe on all GPUs of this node, stage after stage, and go on after a failure of a process.
#   scripts/train_node.sh RECIPE FOLDER STAGE [SETTINGS OF THE STAGE ...]
#   scripts/train_node.sh paper runs/paper t2i --corpus.mixture t2i.json
# torchrun starts the processes again after one has died; every start continues from the last checkpoint.
set -euo pipefail
recipe=$1 folder=$2 stage=$3
shift 3
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
exec torchrun --standalone --nproc_per_node "$gpus" --max-restarts "${RESTARTS:-3}" \
  -m starflow2 train "$recipe" --stage "$stage" --output "$folder" --device cuda "$@"
