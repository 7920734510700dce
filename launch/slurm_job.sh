#!/usr/bin/env bash
# Job script that slurm.sh submits; SLURM runs it on the first node. Not meant to be run by hand.
#
#   slurm_job.sh SETUP COUNT KEY=VALUE... PROGRAM ARGUMENT...
#
# SETUP is a file to source first, or empty. COUNT is the number of KEY=VALUE arguments that follow.
set -euo pipefail
setup=$1 count=$2
shift 2
environment=("${@:1:count}")
shift "$count"

if [[ $setup ]]; then
  set +u # the scripts of modules and conda read unset variables
  # shellcheck disable=SC1090  # after "||", a command that fails in the middle is no error
  . "$setup" || {
    echo "slurm_job.sh: $setup ended with status $?; its last command must succeed" >&2
    exit 2
  }
  set -u
fi
export "${environment[@]}"

requeue=""
# shellcheck disable=SC2329  # called by the traps
forward_term() { # srun forwards the signal to every process of the run
  kill -TERM "$srun" 2>/dev/null || true
}
trap 'requeue=1; forward_term' USR1 # the time limit is near
trap forward_term TERM              # preempted (SLURM then requeues the job) or cancelled
# All GPUs stay visible to every process, and each process selects one by its local rank. With GPU
# binding, the processes of a node could not communicate directly.
#
# A process that has saved ends with a status that is not 0, while others may still be writing: srun
# must not kill these. If a process fails, the others notice after 100 s (JAX's heartbeat) and end.
srun --kill-on-bad-exit=0 --wait=0 --gpu-bind=none "$@" &
srun=$!
status=0
while :; do
  wait "$srun" && status=0 || status=$?
  kill -0 "$srun" 2>/dev/null || break # still running if a signal interrupted wait
done
# 129, 130, 143: saved and ended on a signal.
if [[ $requeue && $status =~ ^(0|129|130|143)$ ]]; then
  echo "slurm_job.sh: saved a checkpoint before the time limit; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
