#!/usr/bin/env bash
# Trains on a SLURM cluster: submits a job that runs hmar train on every GPU of its nodes.
#
#   launch/slurm.sh --nodes=N --gpus_per_node=N [OPTION…] -- ARGUMENTS OF hmar train
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --time=24:00:00 -- --config=configs/hmar.py:d30_256 --workdir=/scratch/d30
#
#   --nodes=N              machines
#   --gpus_per_node=N      GPUs of each; 0 trains on CPUs, one process a node
#   --processes_per_node=N one for each GPU (default), or 1 for all of them
#   --cpus_per_task=N      CPU cores of each process, for reading data (default: what the cluster gives)
#   --name=NAME            of the job (default hmar)
#   --partition= --account= --qos= --reservation= --constraint= --time= --mem=
#                          as sbatch takes them
#   --sbatch=OPTION        any other option of sbatch, such as --sbatch=--exclusive; may come several times
#   --setup=FILE           a file that each node's shell reads first: modules, conda, a virtual environment
#   --logs=DIR             NAME-JOB.out is written there, and added to when the job goes on (default: logs)
#   --grace=SECONDS        before the time limit the run is told to save, and the job is queued again (default 300)
#   --env=KEY=VALUE        for the environment of hmar train; may come several times
#   --hmar=COMMAND         the program on the nodes (default: hmar)
#   --dry-run              print the sbatch command, submit nothing
#
# A job that meets its time limit or is preempted saves, is queued again and goes on where it was; so does the same command
# given again after any kill. scancel --signal=TERM --full JOB saves and ends for good. JAX finds the processes of the job by
# SLURM's variables.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs_bash 4 4

nodes="" gpus_per_node="" processes_per_node="" cpus_per_task="" name=hmar setup="" logs=logs grace=300 hmar=hmar env=() sbatch=()
# shellcheck disable=SC2034  # read below by their names
partition="" account="" qos="" reservation="" constraint="" time="" mem=""
WORDS=("$@")
options_of nodes gpus_per_node processes_per_node cpus_per_task name setup logs grace hmar env+ sbatch+ \
  partition account qos reservation constraint time mem
required nodes gpus_per_node
whole nodes grace
[[ $gpus_per_node == 0 ]] || whole gpus_per_node
processes_per_node=${processes_per_node:-$((gpus_per_node ? gpus_per_node : 1))}
whole processes_per_node
((processes_per_node == 1 || processes_per_node == gpus_per_node)) ||
  die "--processes_per_node=$processes_per_node: 1, or one for each of the $gpus_per_node GPUs is wanted"
[[ ! $cpus_per_task ]] || whole cpus_per_task
[[ ! $setup || $DRY_RUN || -f $setup ]] || die "--setup=$setup: no such file"
train_arguments
environment "${env[@]}"
need sbatch

if ((gpus_per_node)); then
  env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
  # Alone on a node, a process would take the one GPU of its number.
  ((processes_per_node > 1 || gpus_per_node == 1)) || TRAIN+=("--local_devices=$(seq -s, 0 $((gpus_per_node - 1)))")
else
  env=("JAX_PLATFORMS=cpu" "${env[@]}")
fi

job=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$processes_per_node")
((!gpus_per_node)) || job+=("--gpus-per-node=$gpus_per_node")
[[ ! $cpus_per_task ]] || job+=("--cpus-per-task=$cpus_per_task")
for option in partition account qos reservation constraint time mem; do
  [[ ! ${!option} ]] || job+=("--$option=${!option}")
done
job+=(--requeue --open-mode=append "--output=$logs/%x-%j.out" "--signal=B:USR1@$grace" "${sbatch[@]}")
job+=("$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/slurm_job.sh" "$setup" "${#env[@]}" "${env[@]}" "$hmar" train "${TRAIN[@]}")

[[ $DRY_RUN ]] || mkdir -p "$logs" # sbatch does not, and its jobs then vanish without a word
run "${job[@]}"
