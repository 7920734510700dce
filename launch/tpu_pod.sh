#!/usr/bin/env bash
# Trains, or encodes a data set, on a Cloud TPU pod: creates a queued resource, installs hmar on all
# workers and runs it on all of them.
#
# Usage:
#   launch/tpu_pod.sh run --name=NAME --zone=ZONE --accelerator=SLICE [OPTION...] -- HMAR_ARGS
#   launch/tpu_pod.sh logs|status|stop|delete --name=NAME --zone=ZONE [--project=PROJECT]
#
# HMAR_ARGS are the arguments of hmar train, or of another --command. Example:
#   launch/tpu_pod.sh run --name=d30 --zone=us-east5-a --accelerator=v5p-128 --spot -- \
#     --config=configs/hmar.py:d30_256 --workdir=gs://BUCKET/d30 \
#     --config.data.source=tokens:gs://BUCKET/tokens
#
# Commands:
#   run     request the pod if it does not exist, or again if it was preempted or its request
#           failed; wait for it, install, run hmar, and follow the log of worker 0 until the end.
#           Rerun the command to continue: it follows a running hmar and resumes one that was
#           killed. Ctrl-C stops following the log; hmar continues.
#   logs    follow the log of worker 0
#   status  print the state of the pod and the last line of the log of every worker
#   stop    save a checkpoint and end the run; the pod is kept
#   delete  delete the pod
#
# Options:
#   --command=COMMAND        train (default), train-tokenizer or tokenize
#   --project=PROJECT        Google Cloud project (default: the one configured in gcloud)
#   --accelerator=SLICE      accelerator type: v5p-128 (64 chips: v4 and v5p count cores),
#                            v5litepod-64, v6e-64, ..., or a name of hmar plan: v5p:4x4x4, v5e:64
#   --topology=AxB[xC]       with --accelerator=v5p: as for gke.sh
#   --runtime=VERSION        TPU software version (default: the one for the accelerator type). With
#                            it, an accelerator type that is not in the table is passed on as given
#   --spot, --reserved       use spot or reserved capacity instead of on-demand capacity
#   --wait_at_most=DURATION  maximum time the request can be queued, such as 6h (default: no limit)
#   --network= --subnetwork= --service_account= --labels=
#                            passed to gcloud
#   --internal_ips           create the workers without public addresses
#   --iap                    connect to the workers through Identity-Aware Proxy
#   --package=REQUIREMENT    package that pip installs on the workers, such as
#                            hmar_jax[tpu,gcs]==0.1.0 (default: this checkout)
#   --env=KEY=VALUE          set an environment variable of hmar; can be repeated
#   --shared_disk            --workdir (of tokenize: --out) is on a disk that all workers mount;
#                            without this option it must be gs://
#   --until_done             request a preempted pod again until hmar has succeeded or was stopped
#   --detach                 do not follow the log
#   --dry-run                print the commands for a pod that does not exist yet, without running
#                            them
#
# Requires gcloud, logged in. Exit status: that of hmar if its log was followed to the end (143 after
# stop); 2 if an option is invalid.

# shellcheck disable=SC2016  # single-quoted commands are expanded by the shells of the workers
[ -n "${BASH_VERSION:-}" ] || { echo "tpu_pod.sh: requires bash: bash $0 ..." >&2; exit 2; }
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$(dirname "${BASH_SOURCE[0]}")/slices.sh"
require_bash 4 4

[[ ${1:-} && ${1:-} != -* ]] && action=$1 && shift || action=""
name="" project="" zone="" accelerator="" topology="" runtime="" spot="" reserved="" wait_at_most=""
internal_ips="" iap="" package="" env=() shared_disk="" until_done="" detach=""
# shellcheck disable=SC2034  # read by name in request_pod
network="" subnetwork="" service_account="" labels=""
ARGS=("$@")
parse_options name project zone accelerator topology runtime spot! reserved! wait_at_most network \
  subnetwork service_account labels internal_ips! iap! package env+ shared_disk! until_done! detach!
[[ $action ]] || die "requires an action: run, logs, status, stop or delete"
require_choice action run logs status stop delete
require_options name zone
require_resource_name name
[[ $action == run ]] || ((!${#HMAR_ARGS[@]})) || die "$action takes no arguments after --"

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
POLL_SECONDS=${HMAR_POLL_SECONDS:-30}
ARCHIVE="" # temporary archive of this checkout
location=("--zone=$zone")
[[ ! $project ]] || location+=("--project=$project")
connection=()
[[ ! $iap ]] || connection+=(--tunnel-through-iap)
((!${#connection[@]})) && [[ $internal_ips ]] && connection+=(--internal-ip)
trap '[[ ! $ARCHIVE ]] || rm -f "$ARCHIVE"' EXIT

# ssh_workers WORKERS COMMAND: runs COMMAND in a shell on the workers: "all", or a number.
ssh_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "${location[@]}" "${connection[@]}" \
    "--command=$2"
}

# get_state: prints the state of the queued resource, or NONE if it does not exist.
get_state() {
  local text
  if text=$(gcloud compute tpus queued-resources describe "$name" "${location[@]}" \
    '--format=value(state.state)' 2>&1); then
    printf '%s' "$text"
  elif [[ $text == *NOT_FOUND* || $text == *"not found"* ]]; then
    printf NONE
  else
    printf '%s\n' "$text" >&2
    return 1
  fi
}

delete_pod() {
  run gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force --quiet
}

request_pod() {
  local option request=(gcloud compute tpus queued-resources create "$name" "--node-id=$name"
    "${location[@]}" "${slice[@]}" "--runtime-version=$runtime")
  [[ ! $spot ]] || request+=(--spot)
  [[ ! $reserved ]] || request+=(--reserved)
  [[ ! $internal_ips ]] || request+=(--internal-ips)
  [[ ! $wait_at_most ]] || request+=("--valid-until-duration=$wait_at_most")
  for option in network subnetwork service_account labels; do
    [[ ! ${!option} ]] || request+=("--${option//_/-}=${!option}")
  done
  run "${request[@]}"
}

# ensure_pod: requests the pod if necessary and waits until it is active.
ensure_pod() {
  local state last_state=""
  if [[ $DRY_RUN ]]; then
    request_pod
    return
  fi
  while :; do
    state=$(get_state)
    [[ $state == "$last_state" ]] || info "queued resource $name: ${state}"
    last_state=$state
    case $state in
      ACTIVE) return ;;
      NONE) request_pod ;;
      FAILED | SUSPENDED) delete_pod ;; # preempted or never granted; these states are final
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

# install_package: installs the package and JAX for TPUs in ~/hmar/venv on every worker, with Python
# 3.12, because the TPU images come with a Python older than 3.11. Workers that run hmar are
# skipped.
install_package() {
  local requirement=$package
  if [[ ! $package ]]; then
    requirement="./source[tpu,gcs]"
    if [[ ! $DRY_RUN ]]; then
      ARCHIVE=$(mktemp "${TMPDIR:-/tmp}/hmar-XXXXXX.tar.gz")
      # Tracked and untracked files without ignored ones: no virtual environments, runs or data.
      (cd "$REPO_ROOT" && git ls-files -z --cached --others --exclude-standard) >/dev/null ||
        die "--package=REQUIREMENT is required, because $REPO_ROOT is not a git checkout"
      (cd "$REPO_ROOT" && git ls-files -z --cached --others --exclude-standard |
        tar --create --gzip --ignore-failed-read --null --files-from=- --file="$ARCHIVE") \
        2>/dev/null
    fi
    run gcloud compute tpus tpu-vm scp "${ARCHIVE:-THIS_CHECKOUT.tar.gz}" "$name:hmar.tar.gz" \
      --worker=all "${location[@]}" "${connection[@]}"
  fi
  ssh_workers all "set -e; mkdir -p ~/hmar; cd ~/hmar
if test -f pid && test ! -f status && kill -0 \$(cat pid) 2>/dev/null; then exit 0; fi
test ! -f ~/hmar.tar.gz || { rm -rf source; mkdir source; tar -xzf ~/hmar.tar.gz -C source; }
test -x venv/bin/python || {
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 venv
}
venv/bin/python -m pip install --quiet $(shell_quote "$requirement")"
}

# stop_partial_run: if some workers of a run have ended, the others cannot continue and are killed,
# so that all workers can start together.
stop_partial_run() {
  local found
  [[ ! $DRY_RUN ]] || return 0
  found=$(ssh_workers all 'cd ~/hmar 2>/dev/null && test -f pid && test ! -f status &&
kill -0 $(cat pid) 2>/dev/null && echo HMAR_RUNNING || echo HMAR_IDLE')
  [[ $found == *HMAR_RUNNING* && $found == *HMAR_IDLE* ]] || return 0
  info "only some workers are running hmar; stopping them before the restart"
  ssh_workers all 'cd ~/hmar 2>/dev/null || exit 0
test -f status || kill -KILL -$(cat pid) 2>/dev/null || true; echo 137 >status'
}

# start_run: starts hmar on all workers, detached from the SSH connection. Workers on which the same
# command runs are left unchanged; on which another runs, it is an error.
start_run() {
  local text
  text=$(shell_quote env "JAX_PLATFORMS=tpu,cpu" "${env[@]}" venv/bin/hmar "$command" \
    "${HMAR_ARGS[@]}")
  # The outer sh records the exit status. TERM reaches both processes, and sh waits for hmar. A run
  # that was terminated is not done, even if it ended with 0.
  ssh_workers all "set -e; cd ~/hmar
if test -f pid && test ! -f status && kill -0 \$(cat pid) 2>/dev/null; then
  test ! -f command || test \"\$(cat command)\" = $(shell_quote "$text") || {
    echo \"\$(hostname): another hmar is running (process \$(cat pid)); end it with stop first\" >&2
    exit 2
  }
  echo \"\$(hostname): already running (process \$(cat pid))\"; exit 0
fi
rm -f status stopped; test ! -e source/configs || ln -sfn source/configs configs
printf '%s\\n' $(shell_quote "$text") >command
nohup setsid sh -c 'trap t=1 TERM; \"\$@\"; s=\$?; test \$s != 0 || s=\${t:+143}
echo \${s:-0} >status.new; mv status.new status' \
hmar $text </dev/null >>log.txt 2>&1 &
echo \$! >pid; echo \"\$(hostname): running hmar $command\""
}

# follow_log: follows the log of worker 0 until its run ends, then returns the largest exit status
# of all workers. Returns 75 if the connection or the pod is lost, and 76 if hmar was terminated
# (saving a checkpoint), but not by stop: the pod is being preempted.
follow_log() {
  ssh_workers 0 'cd ~/hmar && tail -n 20 -F --pid=$(cat pid) log.txt' || return 75
  ssh_workers all 'cd ~/hmar
i=0; while test ! -f status && test $i -lt 60; do sleep 1; i=$((i + 1)); done
s=$(cat status 2>/dev/null || echo 75)
case $s in
  0) ;;
  129 | 130 | 143) if test -f stopped; then why="stopped on request"; else why=terminated s=76; fi
    echo "$(hostname): $why; run the same command to resume" >&2 ;;
  *) { echo "$(hostname): hmar ended with status $s"; tail -n 5 log.txt; } >&2 ;;
esac
exit $s'
}

require_command gcloud
case $action in
  logs) ssh_workers 0 'cd ~/hmar && tail -n 200 -F --pid=$(cat pid) log.txt' ;;
  status)
    if [[ $DRY_RUN ]]; then
      run gcloud compute tpus queued-resources describe "$name" "${location[@]}" \
        '--format=value(state.state)'
    else
      state=$(get_state)
      echo "$name: $state"
      [[ $state == ACTIVE ]] || exit 0
    fi
    ssh_workers all 'cd ~/hmar 2>/dev/null || exit 0
state="not running, last status $(cat status 2>/dev/null || echo none)"
test -f status || ! kill -0 $(cat pid) 2>/dev/null || state=running
echo "$(hostname): $state"; tail -n 1 log.txt 2>/dev/null || true'
    ;;
  stop) ssh_workers all 'cd ~/hmar 2>/dev/null && test -f pid && test ! -f status || exit 0
: >stopped; kill -TERM -$(cat pid)' ;;
  delete) delete_pod ;;
  run)
    [[ $accelerator || $topology ]] || require_options accelerator
    require_hmar_args
    require_key_value "${env[@]}"
    [[ ! $spot || ! $reserved ]] || die "--spot and --reserved are mutually exclusive"
    known=1
    if [[ $runtime && ! $topology ]]; then
      (parse_slice_options) 2>/dev/null || known=""
    fi
    if [[ $known ]]; then
      parse_slice_options
      slice=("--accelerator-type=$SLICE_TYPE")
      [[ $SLICE_TYPE ]] || slice=("--type=$SLICE_CHIP" "--topology=$SLICE_TOPOLOGY")
      case $SLICE_CHIP in
        v4) default_runtime=tpu-ubuntu2204-base ;;
        v5p) default_runtime=v2-alpha-tpuv5 ;;
        v5e) default_runtime=v2-alpha-tpuv5-lite ;;
        v6e) default_runtime=v2-alpha-tpuv6e ;;
        *) die "Cloud TPU offers no $SLICE_CHIP as a queued resource: use gke.sh" ;;
      esac
      runtime=${runtime:-$default_runtime}
      several=$((SLICE_CHIPS * slice_cores > 8)) # up to 8 cores: one host
    else
      [[ ${accelerator##*-} =~ ^[1-9][0-9]*$ ]] ||
        die "--accelerator must have the form TYPE-N with a positive integer N, such as v5p-128;" \
          "got $accelerator"
      slice=("--accelerator-type=$accelerator")
      several=$((${accelerator##*-} > 8))
    fi
    ((!several)) || refuse_hmar_args "the workers find each other and divide the work" \
      coordinator num_processes process_id local_devices part
    output=$(get_hmar_arg "$output_option")
    [[ $output == gs://* || $shared_disk ]] || ((!several)) ||
      die "--$output_option must be gs://BUCKET/DIR, because the workers of a pod share no disk" \
        "(or give --shared_disk if they do); got $output"
    while :; do
      ensure_pod
      stop_partial_run
      install_package
      start_run
      [[ ! $detach ]] || break
      status=0
      follow_log || status=$?
      ((status)) || break
      if [[ ! $until_done || $DRY_RUN ]]; then
        ((status != 76)) || status=143
        exit "$status"
      fi
      # Terminated by a preemption: the state may still be ACTIVE.
      ((status == 76)) || [[ $(get_state) != ACTIVE ]] || exit "$status"
      info "the pod was preempted or is no longer active (status $status); continuing"
      sleep "$POLL_SECONDS"
    done
    ;;
esac
