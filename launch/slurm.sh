#!/usr/bin/env bash
# Trains, or encodes a data set, on a SLURM cluster: submits a job that runs hmar on every GPU of its
# nodes.
#
# Usage:
#   launch/slurm.sh --nodes=N --gpus_per_node=N [OPTION...] -- HMAR_ARGS
#
# HMAR_ARGS are the arguments of hmar train, or of another --command. Example:
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --time=24:00:00 -- \
#     --config=configs/hmar.py:d30_256 --workdir=/scratch/d30
#
# Options:
#   --command=COMMAND      train (default), train-tokenizer or tokenize
#   --nodes=N              number of nodes
#   --gpus_per_node=N      GPUs on each node; 0 runs on CPUs with one process per node
#   --processes_per_node=N one process per GPU (default), or 1 for all GPUs of a node; tokenize needs
#                          one per GPU
#   --cpus_per_task=N      CPU cores of each process, for data loading (default: set by the cluster)
#   --name=NAME            job name (default: hmar)
#   --partition= --account= --qos= --reservation= --constraint= --time= --mem=
#                          passed to sbatch
#   --sbatch=OPTION        any other sbatch option, such as --sbatch=--exclusive; can be repeated
#   --setup=FILE           file that the shell of the job sources first: modules, conda or a
#                          virtual environment
#   --logs=DIR             directory of the log NAME-JOB.out; a requeued job appends to its log
#                          (default: logs)
#   --grace=SECONDS        time before the time limit at which the run saves a checkpoint and the
#                          job is requeued (default: 300)
#   --env=KEY=VALUE        set an environment variable of hmar; can be repeated
#   --hmar=COMMAND         program to run on the nodes (default: hmar)
#   --dry-run              print the sbatch command without submitting it
#
# A job that reaches its time limit or is preempted saves a checkpoint, is requeued and resumes.
# After any other kill, rerun the same command to resume. scancel --signal=TERM --batch JOB saves a
# checkpoint and ends the job without requeueing it, with exit status 143, so that jobs with
# --dependency=afterok do not start. JAX reads the processes of the job from SLURM's environment
# variables.
[ -n "${BASH_VERSION:-}" ] || { echo "slurm.sh: requires bash: bash $0 ..." >&2; exit 2; }
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
require_bash 4 4

nodes="" gpus_per_node="" processes_per_node="" cpus_per_task="" name=hmar setup="" logs=logs
grace=300 hmar=hmar env=() sbatch=()
# shellcheck disable=SC2034  # read by name in the loop below
partition="" account="" qos="" reservation="" constraint="" time="" mem=""
ARGS=("$@")
parse_options nodes gpus_per_node processes_per_node cpus_per_task name setup logs grace hmar env+ \
  sbatch+ partition account qos reservation constraint time mem
require_options nodes gpus_per_node
require_positive_int nodes grace
[[ $gpus_per_node == 0 ]] || require_positive_int gpus_per_node
processes_per_node=${processes_per_node:-$((gpus_per_node ? gpus_per_node : 1))}
require_positive_int processes_per_node
((processes_per_node == 1 || processes_per_node == gpus_per_node)) ||
  die "--processes_per_node must be 1 or --gpus_per_node ($gpus_per_node); got $processes_per_node"
[[ $command != tokenize ]] || ((gpus_per_node <= processes_per_node)) ||
  die "--processes_per_node must be --gpus_per_node ($gpus_per_node) for tokenize, each of whose" \
    "processes uses one GPU; got $processes_per_node"
[[ ! $cpus_per_task ]] || require_positive_int cpus_per_task
[[ $name != */* ]] || die "--name must not contain /, because it names the log; got $name"
expand_home setup logs hmar
[[ ! $setup || -f $setup ]] || die "--setup must be an existing file; got $setup"
# Not relative to PATH, where bash looks for SETUP first, or to the directory of --sbatch=--chdir.
[[ ! $setup || $setup == /* ]] || setup=$PWD/$setup
[[ $logs == /* ]] || logs=$PWD/$logs
require_hmar_args
((nodes * processes_per_node == 1)) ||
  refuse_hmar_args "the processes of the job find each other and divide the work" \
    coordinator num_processes process_id local_devices part
require_key_value "${env[@]}"
require_command sbatch

if ((gpus_per_node)); then
  env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
  # By default, the only process of a node would use only the GPU with its local rank.
  ((processes_per_node > 1 || gpus_per_node == 1)) ||
    HMAR_ARGS+=("--local_devices=$(seq -s, 0 $((gpus_per_node - 1)))")
else
  env=("JAX_PLATFORMS=cpu" "${env[@]}")
fi

job=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$processes_per_node")
((!gpus_per_node)) || job+=("--gpus-per-node=$gpus_per_node")
[[ ! $cpus_per_task ]] || job+=("--cpus-per-task=$cpus_per_task")
for option in partition account qos reservation constraint time mem; do
  [[ ! ${!option} ]] || job+=("--$option=${!option}")
done
job+=(--requeue --open-mode=append "--output=$logs/%x-%j.out" "--signal=B:USR1@$grace")
job+=("${sbatch[@]}")
job+=("$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slurm_job.sh"
  "$setup" "${#env[@]}" "${env[@]}" "$hmar" "$command" "${HMAR_ARGS[@]}")

# sbatch does not create the log directory, and a job without it fails without a message.
[[ $DRY_RUN ]] || { mkdir -p "$logs" && [[ -w $logs ]]; } 2>/dev/null ||
  die "--logs must be a directory that can be written; got $logs"
run "${job[@]}"
