#!/bin/bash
# After the array: does what a task did not come to, if anything, and writes the report.
#SBATCH --job-name=afterimage-report
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-task=1
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
set -euo pipefail

export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
srun afterimage study "$@"
