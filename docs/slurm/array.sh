#!/bin/bash
# One task of submit.sh's array: group SLURM_ARRAY_TASK_ID of the study's groups.
#SBATCH --job-name=afterimage
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end, or when the task is preempted: stop with a checkpoint.
#SBATCH --signal=TERM@120
set -euo pipefail
groups=$1
shift

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
srun afterimage study "$@" --shard "$SLURM_ARRAY_TASK_ID/$groups"
