#!/usr/bin/env bash
# What a job of slurm.sh runs on its first node; not for use by hand.
#
#   slurm_job.sh SETUP COUNT KEY=VALUE… PROGRAM ARGUMENT…
#
# SETUP is a file to read first, or empty; COUNT is how many KEY=VALUE follow.
set -euo pipefail
setup=$1 count=$2
shift 2
environment=("${@:1:count}")
shift "$count"

if [[ $setup ]]; then
  set +u # modules and conda read variables that are not set
  # shellcheck disable=SC1090
  . "$setup"
  set -u
fi
export "${environment[@]}"

again=""
# shellcheck disable=SC2329  # the traps call it
pass_on() { # srun gives the signal to every process of the run
  kill -TERM "$srun" 2>/dev/null || true
}
trap 'again=1; pass_on' USR1 # the time limit is near
trap pass_on TERM            # preempted, and then SLURM queues the job again; or told to end
# Every process may use every GPU and picks its own by its number: without it, those of a node could not talk directly.
srun --kill-on-bad-exit=1 --gpu-bind=none "$@" &
srun=$!
status=0
while :; do
  wait "$srun" && status=0 || status=$?
  kill -0 "$srun" 2>/dev/null || break # otherwise a signal has ended the wait, not the run
done
if [[ $again ]] && ((status == 0)); then
  echo "slurm_job.sh: saved before the time limit; job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
