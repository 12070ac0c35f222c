#!/usr/bin/env bash
#SBATCH --job-name=tadsr
#SBATCH --output=tadsr-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Job that slurm.sh submits: a segment in a task of an array, otherwise the join.
set -euo pipefail
here=$1 film=$2 out=$3
shift 3
[[ -x $here/step.sh ]] || echo "$(hostname): there is no '$here': mount the shared folder" >&2
step=${SLURM_ARRAY_TASK_ID:-join}
"$here/step.sh" "$film" "$out" "$step" "$@" --threads "$SLURM_CPUS_PER_TASK" && exit
# Slurm starts tasks of lost nodes again by itself, but not those that failed.
if [[ -n ${SLURM_ARRAY_TASK_ID-} && ${SLURM_RESTART_COUNT:-0} -lt 2 ]]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    sleep infinity # until Slurm ends this try
fi
exit 1
