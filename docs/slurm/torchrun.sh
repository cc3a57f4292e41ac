#!/bin/bash
# One training on the devices of one or several machines, data-parallel:
#     sbatch torchrun.sh resnet50:layer2 --decoders residual --data folder:IMAGES
#SBATCH --job-name=afterimage-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

devices="${SLURM_GPUS_ON_NODE:-1}"
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${machines[0]}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / devices > 0 ? ${SLURM_CPUS_PER_TASK:-1} / devices : 1))
# One torchrun a machine; they meet on the first, at a port of the job's own.
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$devices" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))" \
    -m afterimage train "$@"
