#!/usr/bin/env bash
# Trains on a Cloud TPU pod: queued resource, installation on all workers, hmar train on all workers.
#
#   launch/tpu_pod.sh run --name=NAME --zone=ZONE --accelerator=TYPE [OPTION…] -- ARGUMENTS OF hmar train
#   launch/tpu_pod.sh logs|status|stop|delete --name=NAME --zone=ZONE [--project=PROJECT]
#
#   launch/tpu_pod.sh run --name=d30 --zone=us-east5-a --accelerator=v5p-128 --spot -- \
#     --config=configs/hmar.py:d30_256 --workdir=gs://BUCKET/d30 --config.data.source=tokens:gs://BUCKET/tokens
#
# run      asks for the pod where there is none (one that was preempted or failed is asked for anew), waits for it, installs,
#          trains, and shows the log of worker 0 until the end. Given again it goes on: it follows a run that is going, and
#          resumes one that was killed. Ctrl-C ends the watching, not the training.
# logs     follows the log of worker 0      status  state of the pod, and the end of every worker's log
# stop     has the run save and end; the pod stays      delete  gives the pod back
#
#   --project=PROJECT        (default: gcloud's own)
#   --accelerator=TYPE       v5p-128 (64 chips: v4 and v5p count cores), v5litepod-64, v6e-64 …; hmar plan says what fits
#   --runtime=VERSION        software of the workers (default: the one for the type)
#   --spot, --reserved       instead of on demand
#   --wait_at_most=DURATION  how long the request may queue, such as 6h (default: for ever)
#   --network= --subnetwork= --service_account= --labels=
#                            as gcloud takes them
#   --internal_ips           workers without public addresses
#   --iap                    reach them through Identity-Aware Proxy
#   --package=REQUIREMENT    what pip installs on the workers, such as hmar_jax[tpu,gcs]==0.1.0 (default: this checkout)
#   --env=KEY=VALUE          for the environment of hmar train; may come several times
#   --shared_disk            --workdir is on a disk that all workers have mounted; otherwise it must be gs://
#   --until_done             a pod that is preempted is asked for again, until hmar train has ended well
#   --detach                 do not follow the log
#   --dry-run                print the commands as for a pod that does not exist yet, run nothing
#
# Needs gcloud, logged in. Exit status: that of hmar train where it was followed to its end; 2 if an option is wrong.

# shellcheck disable=SC2016  # what stands in single quotes is for the workers' shells
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs_bash 4 4

[[ ${1:-} && ${1:-} != -* ]] && command=$1 && shift || command=""
name="" project="" zone="" accelerator="" runtime="" spot="" reserved="" wait_at_most="" internal_ips="" iap="" package="" env=()
shared_disk="" until_done="" detach=""
# shellcheck disable=SC2034  # read below by their names
network="" subnetwork="" service_account="" labels=""
WORDS=("$@")
options_of name project zone accelerator runtime spot! reserved! wait_at_most network subnetwork service_account labels \
  internal_ips! iap! package env+ shared_disk! until_done! detach!
[[ $command ]] || die "a command is missing: run, logs, status, stop or delete"
one_of command run logs status stop delete
required name zone
plain_name name
[[ $command == run ]] || ((!${#TRAIN[@]})) || die "$command takes no arguments of hmar train"

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
POLL_SECONDS=${HMAR_POLL_SECONDS:-30}
ARCHIVE="" # this checkout, packed
where=("--zone=$zone")
[[ ! $project ]] || where+=("--project=$project")
tunnel=()
[[ ! $iap ]] || tunnel+=(--tunnel-through-iap)
((!${#tunnel[@]})) && [[ $internal_ips ]] && tunnel+=(--internal-ip)
trap '[[ ! $ARCHIVE ]] || rm -f "$ARCHIVE"' EXIT

# on WORKERS COMMAND: in a shell of these workers ("all", or a number).
on() {
  run gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "${where[@]}" "${tunnel[@]}" "--command=$2"
}

state() { # of the queued resource; NONE if there is none
  local text
  if text=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>&1); then
    printf '%s' "$text"
  elif [[ $text == *NOT_FOUND* || $text == *"not found"* ]]; then
    printf NONE
  else
    printf '%s\n' "$text" >&2
    return 1
  fi
}

give_back() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

ask() {
  local option request=(gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}"
    "--accelerator-type=$accelerator" "--runtime-version=$runtime")
  [[ ! $spot ]] || request+=(--spot)
  [[ ! $reserved ]] || request+=(--reserved)
  [[ ! $internal_ips ]] || request+=(--internal-ips)
  [[ ! $wait_at_most ]] || request+=("--valid-until-duration=$wait_at_most")
  for option in network subnetwork service_account labels; do
    [[ ! ${!option} ]] || request+=("--${option//_/-}=${!option}")
  done
  run "${request[@]}"
}

# Until the pod is there.
get_pod() {
  local now last=""
  if [[ $DRY_RUN ]]; then
    ask
    return
  fi
  while :; do
    now=$(state)
    [[ $now == "$last" ]] || note "the queued resource $name is ${now}"
    last=$now
    case $now in
      ACTIVE) return ;;
      NONE) ask ;;
      FAILED | SUSPENDED) give_back ;; # preempted, or never granted: it would stay so for ever
      *) sleep "$POLL_SECONDS" ;;
    esac
  done
}

# The package and JAX for TPUs, in ~/hmar/venv of every worker. The images come with an older Python than 3.11.
install() {
  local requirement=$package
  if [[ ! $package ]]; then
    requirement="./source[tpu,gcs]"
    if [[ ! $DRY_RUN ]]; then
      ARCHIVE=$(mktemp "${TMPDIR:-/tmp}/hmar-XXXXXX.tar.gz")
      # What git knows or would add: no environments, no runs, no data.
      (cd "$HERE" && git ls-files -z --cached --others --exclude-standard) >/dev/null ||
        die "$HERE is no git checkout: say what to install with --package=REQUIREMENT"
      (cd "$HERE" && git ls-files -z --cached --others --exclude-standard |
        tar --create --gzip --ignore-failed-read --null --files-from=- --file="$ARCHIVE") 2>/dev/null
    fi
    run gcloud compute tpus tpu-vm scp "${ARCHIVE:-THIS_CHECKOUT.tar.gz}" "$name:hmar.tar.gz" --worker=all "${where[@]}" "${tunnel[@]}"
  fi
  on all "set -e; mkdir -p ~/hmar; cd ~/hmar
if test -f pid && test ! -f status && kill -0 \$(cat pid) 2>/dev/null; then exit 0; fi # never under a run that is going
test ! -f ~/hmar.tar.gz || { rm -rf source; mkdir source; tar -xzf ~/hmar.tar.gz -C source; }
test -x venv/bin/python || { python3 -m pip install --quiet --user uv; python3 -m uv venv --quiet --seed --python 3.12 venv; }
venv/bin/python -m pip install --quiet $(quoted "$requirement")"
}

# A run of which some workers have died cannot go on: the others are ended too, before it is begun again.
clear() {
  local found
  [[ ! $DRY_RUN ]] || return 0
  found=$(on all 'cd ~/hmar 2>/dev/null && test -f pid && test ! -f status && kill -0 $(cat pid) 2>/dev/null && echo HMAR_TRAINS || echo HMAR_IDLE')
  [[ $found == *HMAR_TRAINS* && $found == *HMAR_IDLE* ]] || return 0
  note "some workers train and some do not: ending the rest of that run"
  on all 'cd ~/hmar 2>/dev/null || exit 0; test -f status || kill -KILL -$(cat pid) 2>/dev/null || true; echo 137 >status'
}

# Starts hmar train on all workers at once, away from the connection. A worker where it is going is left alone.
start() {
  local program
  program=$(quoted env "JAX_PLATFORMS=tpu,cpu" "${env[@]}" venv/bin/hmar train "${TRAIN[@]}")
  # The shell around it keeps the exit status; TERM goes to both, and the shell waits.
  on all "set -e; cd ~/hmar
if test -f pid && test ! -f status && kill -0 \$(cat pid) 2>/dev/null; then echo \"\$(hostname): training already, as process \$(cat pid)\"; exit 0; fi
rm -f status; test ! -e source/configs || ln -sfn source/configs configs
nohup setsid sh -c 'trap : TERM; \"\$@\"; echo \$? >status.new; mv status.new status' hmar $program </dev/null >>log.txt 2>&1 &
echo \$! >pid; echo \"\$(hostname): training\""
}

# Shows the log of worker 0 until its run ends; then the exit status is the largest of all workers'.
follow() {
  on 0 'cd ~/hmar && tail -n 20 -F --pid=$(cat pid) log.txt' || return 75 # the connection; or the pod has gone
  on all 'cd ~/hmar; i=0; while test ! -f status && test $i -lt 60; do sleep 1; i=$((i + 1)); done
s=$(cat status 2>/dev/null || echo 75); test $s = 0 || { echo "$(hostname): hmar train ended with status $s" >&2; tail -n 5 log.txt >&2; }; exit $s'
}

need gcloud
case $command in
  logs) on 0 'cd ~/hmar && tail -n 200 -F --pid=$(cat pid) log.txt' ;;
  status)
    if [[ $DRY_RUN ]]; then
      run gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    else
      now=$(state)
      echo "$name: $now"
      [[ $now == ACTIVE ]] || exit 0
    fi
    on all 'cd ~/hmar 2>/dev/null || exit 0; echo "$(hostname): $(test ! -f status && kill -0 $(cat pid) 2>/dev/null && echo training || echo "not training, last status $(cat status 2>/dev/null || echo none)")"; tail -n 1 log.txt 2>/dev/null || true'
    ;;
  stop) on all 'cd ~/hmar && kill -TERM -$(cat pid)' ;;
  delete) give_back ;;
  run)
    required accelerator
    train_arguments
    environment "${env[@]}"
    [[ ! $spot || ! $reserved ]] || die "--spot and --reserved exclude each other"
    case $accelerator in
      v4-* | v3-* | v2-*) default_runtime=tpu-ubuntu2204-base ;;
      v5p-*) default_runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
      v6e-*) default_runtime=v2-alpha-tpuv6e ;;
      *) [[ $runtime ]] || die "--accelerator=$accelerator: known are v4-N, v5p-N, v5litepod-N, v6e-N; for another give --runtime too"
        default_runtime="" ;;
    esac
    [[ ${accelerator##*-} =~ ^[1-9][0-9]*$ ]] || die "--accelerator=$accelerator: TYPE-N with a whole number N is wanted, such as v5p-128"
    runtime=${runtime:-$default_runtime}
    workdir=$(workdir_of)
    [[ $workdir == gs://* || $shared_disk ]] || ((${accelerator##*-} <= 8)) ||
      die "--workdir=$workdir: the workers of a pod share no disk; gs://BUCKET/DIR is wanted (or --shared_disk, if they do)"
    while :; do
      get_pod
      clear
      install
      start
      [[ ! $detach ]] || break
      if follow; then
        break
      else
        status=$?
        [[ $until_done && ! $DRY_RUN && $(state) != ACTIVE ]] || exit "$status"
        note "the pod has gone (status $status): asking for another"
      fi
    done
    ;;
esac
