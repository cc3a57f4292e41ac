#!/bin/bash
# A study on a Ray cluster that lives as long as this job, on all its machines:
#     sbatch ray.sh STUDY [the study's flags]
#SBATCH --job-name=afterimage-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
# To this script alone, which passes it on to the study: Ray has to live until the checkpoints are written.
#SBATCH --signal=B:TERM@120
set -euo pipefail

export RAY_USAGE_STATS_ENABLED=0
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${machines[0]}
address="$head:$((20000 + SLURM_JOB_ID % 10000))"
has=(--num-cpus "${SLURM_CPUS_PER_TASK:-1}" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" --block)

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address "$head" --port "${address##*:}" --include-dashboard=false "${has[@]}" &
started=($!)
if ((SLURM_NNODES > 1)); then
    srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
        ray start --address "$address" "${has[@]}" &
    started+=($!)
fi
trap 'kill "${started[@]}" 2> /dev/null || true' EXIT

# Until all machines are there, but no longer than five minutes: the study shares them out when it starts.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" python - "$address" "$SLURM_NNODES" <<'PYTHON'
import sys, time

import ray

address, wanted, end = sys.argv[1], int(sys.argv[2]), time.monotonic() + 300
while time.monotonic() < end:
    try:
        if not ray.is_initialized():
            ray.init(address, log_to_driver=False, logging_level="ERROR")
        if sum(node["Alive"] for node in ray.nodes()) >= wanted:
            sys.exit()
    except (ConnectionError, RuntimeError, ValueError):
        pass
    time.sleep(1)
sys.exit(f"after five minutes Ray at {address} has not all of the job's {wanted} machines")
PYTHON

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    afterimage study "$@" --executor ray --address "$address" &
study=$!
trap 'kill -TERM "$study"' TERM
# A signal ends the first wait; the second is for the study's own end.
wait "$study" || wait "$study"
