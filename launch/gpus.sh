#!/usr/bin/env bash
# Trains, or encodes a data set, on the GPUs of this machine.
#
# Usage:
#   launch/gpus.sh [OPTION...] -- HMAR_ARGS
#
# HMAR_ARGS are the arguments of hmar train, or of another --command. Example:
#   launch/gpus.sh -- --config=configs/hmar.py:d16_256 --workdir=runs/d16 \
#     --config.data.source=tokens:DIR
#
# Options:
#   --command=COMMAND    train (default), train-tokenizer or tokenize
#   --gpus=N             number of GPUs (default: all that nvidia-smi lists)
#   --one_process_a_gpu  start one process per GPU, as on a cluster, instead of one for all GPUs.
#                        With tokenize, each of them writes its --part of the files.
#   --port=N             port of the coordinator of these processes (default: 12355, or the next one
#                        that is free)
#   --log=FILE           also append the output to FILE (default: only WORKDIR/log.txt, which
#                        training writes). With --one_process_a_gpu the output of the other
#                        processes goes to FILE.1, FILE.2, ...; without --log it is discarded.
#   --env=KEY=VALUE      set an environment variable of hmar; can be repeated
#   --hmar=COMMAND       program to run (default: hmar)
#   --dry-run            print the commands without running them
#
# Rerun the same command to resume after a kill, a reboot or a partial run. TERM, HUP and Ctrl-C
# are passed on: hmar saves a checkpoint and ends, and the exit status is 128 + the signal. A second
# signal kills the processes. If one process fails, the others are stopped, and the exit status is
# that of the failed process.
[ -n "${BASH_VERSION:-}" ] || { echo "gpus.sh: requires bash: bash $0 ..." >&2; exit 2; }
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_bash 5 1

gpus="" one_process_a_gpu="" port="" log="" hmar=hmar env=() seen=""
ARGS=("$@")
parse_options gpus one_process_a_gpu! port log env+ hmar
require_hmar_args
refuse_hmar_args "gpus.sh sets it (several machines: see docs/training_at_scale.md)" \
  coordinator num_processes process_id local_devices
require_key_value "${env[@]}"
expand_home log hmar
# JAX_PLATFORMS makes a missing GPU an error instead of a slow run on the CPU, and XLA can use most
# of the GPU memory. Values of --env come last and take precedence.
env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -r -a visible <<<"${CUDA_VISIBLE_DEVICES// /}"
  # CUDA itself ends the list at the first of these, without a word.
  for id in "${visible[@]}"; do
    if [[ ! $id || $id == -* || ",$seen," == *",$id,"* ]]; then
      die "CUDA_VISIBLE_DEVICES must list different GPUs, such as 0,1; got $CUDA_VISIBLE_DEVICES"
    fi
    seen+=",$id"
  done
  gpus=${gpus:-${#visible[@]}}
elif [[ ! $gpus ]]; then
  problem="nvidia-smi is not on PATH"
  if command -v nvidia-smi >/dev/null; then
    problem="nvidia-smi lists no GPU"
    gpus=$(nvidia-smi -L | grep -c '^GPU') || gpus=""
  fi
  if [[ ! $gpus ]]; then
    [[ $DRY_RUN ]] || die "cannot count the GPUs: $problem; give their number with --gpus=N"
    gpus=1
    info "$problem: the commands are those for one GPU; give another number with --gpus=N"
  fi
fi
require_positive_int gpus
if [[ ! ${visible+set} ]]; then
  IFS=, read -r -a visible <<<"$(seq -s, 0 $((gpus - 1)))"
fi
((gpus <= ${#visible[@]})) || die "--gpus must be at most ${#visible[@]}, the number of GPUs in" \
  "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES; got $gpus"
visible=("${visible[@]:0:gpus}")
require_command "$hmar"

num_processes=1
[[ ! $one_process_a_gpu ]] || num_processes=$gpus
part="" # I/N of --part: this machine's share of the files
if [[ $command == tokenize ]]; then
  part=$(get_hmar_arg part)
  part=${part:-0/1}
  if [[ ! $part =~ ^(0|[1-9][0-9]*)/[1-9][0-9]*$ ]] || ((${part%/*} >= ${part#*/})); then
    die "--part must be I/N with I in [0, N - 1], such as 0/4; got $part"
  fi
fi

# is_port_open PORT: whether a program of this machine listens there, such as another run.
is_port_open() {
  (: </dev/tcp/127.0.0.1/"$1") 2>/dev/null
}
if [[ $port ]]; then
  require_positive_int port
  ((port <= 65535)) || die "--port must be at most 65535; got $port"
  [[ $DRY_RUN || ! $one_process_a_gpu || $part ]] || ! is_port_open "$port" ||
    die "--port=$port is in use, perhaps by another run; give another one"
else
  port=12355
  while [[ ! $DRY_RUN && $one_process_a_gpu && ! $part ]] && is_port_open "$port"; do
    port=$((port + 1))
  done
fi

hmar_command=()
# build_command I: sets hmar_command to the command of process I.
build_command() {
  local options=("--num_processes=$num_processes") devices
  devices=$(IFS=,; printf '%s' "${visible[*]}")
  if [[ $part ]]; then
    # The processes of tokenize do not connect: each has its own files and sees its own GPU. A later
    # --part replaces that of HMAR_ARGS.
    options=("--part=$((${part%/*} * num_processes + $1))/$((${part#*/} * num_processes))")
    [[ ! $one_process_a_gpu ]] || devices=${visible[$1]}
  elif [[ $one_process_a_gpu ]]; then
    options=("--coordinator=127.0.0.1:$port" "${options[@]}" "--process_id=$1"
      "--local_devices=$1")
  fi
  hmar_command=(env "CUDA_VISIBLE_DEVICES=$devices" "${env[@]}" "$hmar" "$command"
    "${HMAR_ARGS[@]}" "${options[@]}")
}

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < num_processes; i++)); do
    build_command "$i"
    run "${hmar_command[@]}"
  done
  exit 0
fi

if [[ $log ]]; then
  { mkdir -p "$(dirname "$log")" && : >>"$log"; } 2>/dev/null ||
    die "--log must be a file that can be written; got $log"
fi
pids=() stop_signal=0
# shellcheck disable=SC2329  # called by the traps
pass_on() { # pass_on NUMBER: the first signal asks the processes to save and end
  local signal=TERM
  ((!stop_signal)) || signal=KILL
  stop_signal=$1
  ((!${#pids[@]})) || kill -"$signal" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on 1' HUP
trap 'pass_on 2' INT
trap 'pass_on 15' TERM
# With job control, each process is a process group of its own. The terminal's Ctrl-C then reaches
# this script only, and each process gets one signal instead of two.
set -m
for ((i = 0; i < num_processes; i++)); do
  build_command "$i"
  if ((i)); then
    "${hmar_command[@]}" >>"${log:-/dev/null}${log:+.$i}" 2>&1 </dev/null &
  elif [[ $log ]]; then
    # tee must outlive the signals: without a reader, the output of hmar would fail.
    "${hmar_command[@]}" > >(trap '' HUP INT TERM; exec tee -a "$log") \
      2> >(trap '' HUP INT TERM; exec tee -a "$log" >&2) </dev/null &
  else
    "${hmar_command[@]}" </dev/null &
  fi
  pids+=($!)
done
set +m
((!stop_signal)) || kill -TERM "${pids[@]}" 2>/dev/null || true

# Wait for all processes; the first failure stops the others. A trapped signal also interrupts wait,
# while the processes are still running.
status=0 stopped=""
while ((${#pids[@]})); do
  ended="" code=0
  wait -n -p ended "${pids[@]}" 2>/dev/null || code=$?
  if [[ ! ${ended:-} ]]; then
    # Unset if a signal interrupted wait, or if bash has dropped the job of a killed process from
    # its table. It may still know the status.
    for pid in "${pids[@]}"; do
      kill -0 "$pid" 2>/dev/null || ended=$pid
    done
    [[ ${ended:-} ]] || continue
    code=0
    wait "$ended" 2>/dev/null || code=$?
    ((code != 127)) || code=137 # forgotten
  fi
  remaining=()
  for pid in "${pids[@]}"; do
    [[ $pid == "$ended" ]] || remaining+=("$pid")
  done
  pids=("${remaining[@]}")
  if is_stop_status "$code" || ((code && stop_signal)); then
    # Asked to stop, by this script or directly: the others save too and end by themselves.
    stopped=1
    is_stop_status "$code" || ((code == 137 || status)) || status=$code # 137: by a second signal
  elif ((code && !status)); then
    status=$code
    ((!${#pids[@]})) || info "process $ended failed with status $code; stopping the other processes"
    ((!${#pids[@]})) || kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
done
if ((!status)) && [[ $stopped ]]; then
  status=$((stop_signal ? 128 + stop_signal : 143))
fi
exit "$status"
