#!/usr/bin/env bash
# Train a stage of a recipe on several nodes under SLURM; FOLDER has to be on a file system that all nodes see.
#   sbatch --nodes 4 scripts/train_slurm.sh RECIPE FOLDER STAGE [SETTINGS OF THE STAGE ...]
# Ten minutes before its time is over, or when the job is preempted, SLURM sends SIGTERM to every process: the run writes
# a checkpoint and ends, the job is queued again and continues, on as many nodes as it is given then. One process per
# GPU is started by srun itself: torchrun would give them half a minute for that checkpoint.
#SBATCH --job-name=starflow2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
recipe=$1 folder=$2 stage=$3
shift 3
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${PORT:-29500} LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
srun --kill-on-bad-exit bash -c \
  'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m starflow2 "$@"' bash \
  train "$recipe" --stage "$stage" --output "$folder" --device cuda --shard.mode hsdp "$@" || ended=$?
# ended by a signal or by a lost node, with steps left: queue the job again, up to ten times in all
if [ "${ended:-0}" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-10}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "${ended:-0}"
