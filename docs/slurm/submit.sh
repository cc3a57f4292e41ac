#!/bin/bash
# A study as a job array, a task for each group of runs, and a job after them for what remains and the report:
#     bash submit.sh STUDY [the study's flags]
# Partition, account and time go into array.sh, or before the call as SBATCH_PARTITION=... SBATCH_TIMELIMIT=...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

groups=$(afterimage study "$@" --list-groups | wc -l)
array=$(sbatch --parsable --array="1-$groups" "$here/array.sh" "$groups" "$@")
sbatch --dependency="afterany:${array%%;*}" "$here/report.sh" "$@"
