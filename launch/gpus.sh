#!/usr/bin/env bash
# Trains on the GPUs of this machine.
#
#   launch/gpus.sh [OPTION…] -- ARGUMENTS OF hmar train
#   launch/gpus.sh -- --config=configs/hmar.py:d16_256 --workdir=runs/d16 --config.data.source=tokens:DIR
#
#   --gpus=N            how many of them (default: all that nvidia-smi lists)
#   --one_process_a_gpu one process for each GPU, as on a cluster, instead of one for all
#   --port=N            where those processes meet (default 12355)
#   --log=FILE          also write what is printed to this file, at its end (default: only WORKDIR/log.txt, which hmar train
#                       keeps; with --one_process_a_gpu the others' output goes to FILE.1, FILE.2, … or is dropped)
#   --env=KEY=VALUE     for the environment of hmar train; may come several times
#   --hmar=COMMAND      the program (default: hmar)
#   --dry-run           print the commands, run nothing
#
# The same command goes on after a kill, a reboot or a finished part. TERM or Ctrl-C is passed on: hmar train saves and ends.
# If one process fails the others are stopped, and the exit status is that of the one that failed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs_bash 5 1

gpus="" one_process_a_gpu="" port=12355 log="" hmar=hmar env=()
WORDS=("$@")
options_of gpus one_process_a_gpu! port log env+ hmar
train_arguments
environment "${env[@]}"
# No silent training on the CPU, and most of the memory for XLA; what --env says comes later and wins.
env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
  gpus=${gpus:-${#visible[@]}}
elif [[ ! $gpus ]]; then
  command -v nvidia-smi >/dev/null || die "nvidia-smi is not on PATH: say how many GPUs there are with --gpus=N"
  gpus=$(nvidia-smi -L | grep -c '^GPU') || die "nvidia-smi lists no GPU"
fi
whole gpus port
if [[ ${visible+set} ]]; then
  ((gpus <= ${#visible[@]})) || die "--gpus=$gpus: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#visible[@]} of them"
  devices=$(IFS=,; printf '%s' "${visible[*]:0:gpus}")
else
  devices=$(seq -s, 0 $((gpus - 1)))
fi
env=("CUDA_VISIBLE_DEVICES=$devices" "${env[@]}")
need "$hmar"

start=() # process i's command
processes=1
[[ ! $one_process_a_gpu ]] || processes=$gpus
command_of() {
  if [[ $one_process_a_gpu ]]; then
    start=(env "${env[@]}" "$hmar" train "${TRAIN[@]}"
      "--coordinator=127.0.0.1:$port" "--num_processes=$gpus" "--process_id=$1" "--local_devices=$1")
  else
    start=(env "${env[@]}" "$hmar" train "${TRAIN[@]}" --num_processes=1)
  fi
}

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    run "${start[@]}"
  done
  exit 0
fi

pids=()
stop() {
  ((!${#pids[@]})) || kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop TERM INT
[[ ! $log ]] || mkdir -p "$(dirname "$log")"
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  if ((i)); then
    "${start[@]}" >>"${log:-/dev/null}${log:+.$i}" 2>&1 &
  elif [[ $log ]]; then
    "${start[@]}" > >(tee -a "$log") 2> >(tee -a "$log" >&2) &
  else
    "${start[@]}" &
  fi
  pids+=($!)
done

# Waits for all; the first failure stops the others. A trapped signal ends a wait too, with the process still there.
status=0
while ((${#pids[@]})); do
  ended="" code=0
  wait -n -p ended "${pids[@]}" || code=$?
  [[ ${ended:-} ]] || continue # unset where a signal ended the wait
  left=()
  for pid in "${pids[@]}"; do
    [[ $pid == "$ended" ]] || left+=("$pid")
  done
  pids=("${left[@]}")
  if ((code && !status)); then
    status=$code
    ((!${#pids[@]})) || note "process $ended failed with status $code: stopping the others"
    stop
  fi
done
exit "$status"
