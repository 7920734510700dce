#!/usr/bin/env bash
# Trains on the GPUs of this machine.
#
# Usage:
#   launch/gpus.sh [OPTION...] -- TRAIN_ARGS
#
# TRAIN_ARGS are the arguments of hmar train. Example:
#   launch/gpus.sh -- --config=configs/hmar.py:d16_256 --workdir=runs/d16 \
#     --config.data.source=tokens:DIR
#
# Options:
#   --gpus=N             number of GPUs (default: all that nvidia-smi lists)
#   --one_process_a_gpu  start one process per GPU, as on a cluster, instead of one for all GPUs
#   --port=N             port of the coordinator of these processes (default: 12355)
#   --log=FILE           also append the output to FILE (default: only WORKDIR/log.txt, which
#                        hmar train writes). With --one_process_a_gpu the output of the other
#                        processes goes to FILE.1, FILE.2, ...; without --log it is discarded.
#   --env=KEY=VALUE      set an environment variable of hmar train; can be repeated
#   --hmar=COMMAND       program to run (default: hmar)
#   --dry-run            print the commands without running them
#
# Rerun the same command to resume after a kill, a reboot or a partial run. TERM and Ctrl-C are
# forwarded: hmar train saves a checkpoint and exits. If one process fails, the others are stopped,
# and the exit status is that of the failed process.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_bash 5 1

gpus="" one_process_a_gpu="" port=12355 log="" hmar=hmar env=()
ARGS=("$@")
parse_options gpus one_process_a_gpu! port log env+ hmar
require_train_args
require_key_value "${env[@]}"
# JAX_PLATFORMS makes a missing GPU an error instead of a slow run on the CPU, and XLA can use most
# of the GPU memory. Values of --env come last and take precedence.
env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
  gpus=${gpus:-${#visible[@]}}
elif [[ ! $gpus ]]; then
  command -v nvidia-smi >/dev/null ||
    die "cannot count the GPUs: nvidia-smi is not on PATH; give their number with --gpus=N"
  gpus=$(nvidia-smi -L | grep -c '^GPU') || die "nvidia-smi lists no GPU"
fi
require_positive_int gpus port
if [[ ${visible+set} ]]; then
  ((gpus <= ${#visible[@]})) || die "--gpus must be at most ${#visible[@]}, the number of GPUs in" \
    "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; got $gpus"
  devices=$(IFS=,; printf '%s' "${visible[*]:0:gpus}")
else
  devices=$(seq -s, 0 $((gpus - 1)))
fi
env=("CUDA_VISIBLE_DEVICES=$devices" "${env[@]}")
require_command "$hmar"

num_processes=1
[[ ! $one_process_a_gpu ]] || num_processes=$gpus
train_command=()
# build_command I: sets train_command to the command of process I.
build_command() {
  if [[ $one_process_a_gpu ]]; then
    train_command=(env "${env[@]}" "$hmar" train "${TRAIN_ARGS[@]}"
      "--coordinator=127.0.0.1:$port" "--num_processes=$gpus"
      "--process_id=$1" "--local_devices=$1")
  else
    train_command=(env "${env[@]}" "$hmar" train "${TRAIN_ARGS[@]}" --num_processes=1)
  fi
}

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < num_processes; i++)); do
    build_command "$i"
    run "${train_command[@]}"
  done
  exit 0
fi

pids=()
stop_processes() {
  ((!${#pids[@]})) || kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop_processes TERM INT
[[ ! $log ]] || mkdir -p "$(dirname "$log")"
for ((i = 0; i < num_processes; i++)); do
  build_command "$i"
  if ((i)); then
    "${train_command[@]}" >>"${log:-/dev/null}${log:+.$i}" 2>&1 &
  elif [[ $log ]]; then
    "${train_command[@]}" > >(tee -a "$log") 2> >(tee -a "$log" >&2) &
  else
    "${train_command[@]}" &
  fi
  pids+=($!)
done

# Wait for all processes; the first failure stops the others. A trapped signal also interrupts wait,
# while the processes are still running.
status=0
while ((${#pids[@]})); do
  ended="" code=0
  wait -n -p ended "${pids[@]}" || code=$?
  [[ ${ended:-} ]] || continue # unset if a signal interrupted wait
  remaining=()
  for pid in "${pids[@]}"; do
    [[ $pid == "$ended" ]] || remaining+=("$pid")
  done
  pids=("${remaining[@]}")
  if ((code && !status)); then
    status=$code
    ((!${#pids[@]})) || info "process $ended failed with status $code; stopping the other processes"
    stop_processes
  fi
done
exit "$status"
