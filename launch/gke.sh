#!/usr/bin/env bash
# Trains, or encodes a data set, on a Kubernetes cluster with TPUs or GPUs (GKE) by creating a JobSet.
#
# Usage:
#   launch/gke.sh run --name=NAME --image=IMAGE --accelerator=SLICE [OPTION...] -- HMAR_ARGS
#   launch/gke.sh run --name=NAME --image=IMAGE --accelerator=TYPE --nodes=N --gpus_per_node=N \
#     [OPTION...] -- HMAR_ARGS
#   launch/gke.sh logs|status|delete --name=NAME [--namespace=NAMESPACE --context=CONTEXT]
#
# HMAR_ARGS are the arguments of hmar train, or of another --command. Example:
#   launch/gke.sh run --name=d30 --image=REGISTRY/hmar --accelerator=v5p --topology=4x4x4 -- \
#     --config=configs/hmar.py:d30_256 --workdir=gs://BUCKET/d30 \
#     --config.data.source=tokens:gs://BUCKET/tokens
#
# Commands:
#   run     create the JobSet and follow the log of its first pod. An ended JobSet of the same name
#           is replaced and its run resumes; a running JobSet is left unchanged.
#   logs    follow the log of the first pod
#   status  print the JobSet and its pods
#   delete  delete the JobSet; the run saves a checkpoint before its pods are removed
#
# Options:
#   --command=COMMAND        train (default), train-tokenizer or tokenize
#   --image=IMAGE            container image with hmar on PATH (built from launch/Dockerfile)
#   --accelerator=SLICE      TPU slice, by a name of hmar plan, Cloud TPU or GKE: v5p:4x4x4, v5e:64,
#                            v5p-128 (cores), tpu-v5p-slice:4x4x4; or a chip (v4, v5e, v5p, v6e,
#                            tpu7x) or label of GKE, with --topology; or a GPU type of GKE, such as
#                            nvidia-h100-80gb
#   --topology=AxB[xC]       TPU slice topology, if --accelerator does not name it
#   --chips_per_node=N       TPU chips per node (default: 4; 8 for v5e:2x4 and v6e:2x4; all chips of
#                            a smaller slice)
#   --nodes=N --gpus_per_node=N
#                            number of GPU nodes and of GPUs on each; one process per node
#   --namespace= --context=  passed to kubectl
#   --service_account=NAME   Kubernetes service account of the pods, with access to the bucket
#                            (Workload Identity)
#   --queue=NAME             Kueue local queue
#   --spot                   use spot nodes
#   --cpu= --memory=         resource limits in addition to the accelerators, such as --memory=300Gi
#   --restarts=N             maximum number of restarts after a failure or the loss of a node; each
#                            restart resumes the run (default: 100)
#   --grace=SECONDS          time to save a checkpoint when a pod is terminated (default: 300)
#   --env=KEY=VALUE          set an environment variable of hmar; can be repeated
#   --detach                 do not follow the log
#   --dry-run                print the JobSet and the commands without running them
#
# Requires kubectl, and JobSet installed in the cluster.
[ -n "${BASH_VERSION:-}" ] || { echo "gke.sh: requires bash: bash $0 ..." >&2; exit 2; }
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$(dirname "${BASH_SOURCE[0]}")/slices.sh"
require_bash 4 4

[[ ${1:-} && ${1:-} != -* ]] && action=$1 && shift || action=""
name="" image="" accelerator="" topology="" chips_per_node="" nodes="" gpus_per_node=""
namespace="" context="" service_account="" queue="" spot="" cpu="" memory="" restarts=100 grace=300
env=() detach=""
ARGS=("$@")
parse_options name image accelerator topology chips_per_node nodes gpus_per_node namespace context \
  service_account queue spot! cpu memory restarts grace env+ detach!
[[ $action ]] || die "requires an action: run, logs, status or delete"
require_choice action run logs status delete
require_options name
require_resource_name name
[[ $action == run ]] || ((!${#HMAR_ARGS[@]})) || die "$action takes no arguments after --"
require_command kubectl
kubectl=(kubectl)
[[ ! $context ]] || kubectl+=("--context=$context")
[[ ! $namespace ]] || kubectl+=("--namespace=$namespace")

# json_string TEXT: prints TEXT as a JSON string, which is also valid YAML. Control characters other
# than newline and tab are rejected below.
json_string() {
  local s=$1
  s=${s//\\/\\\\}
  s=${s//\"/\\\"}
  s=${s//$'\n'/\\n}
  s=${s//$'\t'/\\t}
  printf '"%s"' "$s"
}

# json_list WORD...: prints a JSON list. $ becomes $$, which Kubernetes reads as a literal $ instead
# of expanding a variable.
json_list() {
  local word all=""
  for word in "$@"; do
    all+=", $(json_string "${word//\$/\$\$}")"
  done
  printf '[%s]' "${all#, }"
}

# The command of each pod. On TERM, hmar saves a checkpoint and exits, with status 143 or 0; the pod
# must fail in any case, because the JobSet would otherwise count as complete.
# shellcheck disable=SC2016  # expanded by the shell of the pod
POD_SCRIPT='terminated=; trap "terminated=1; kill -TERM \$!" TERM
hmar "$@" & while :; do wait $!; status=$?; kill -0 $! 2>/dev/null || break; done
[ -z "$terminated" ] || [ $status != 0 ] || status=143; exit $status'

# make_jobset: prints the JobSet in YAML.
make_jobset() {
  local pair key metadata="" selector limits args
  [[ ! $queue ]] || metadata="
  labels: {kueue.x-k8s.io/queue-name: $(json_string "$queue")}"
  if [[ $tpu ]]; then
    # A TPU slice of several hosts is a node pool of its own.
    metadata+="
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
    selector="cloud.google.com/gke-tpu-accelerator: $(json_string "$SLICE_LABEL")"
    selector+=", cloud.google.com/gke-tpu-topology: $(json_string "$SLICE_TOPOLOGY")"
    limits="google.com/tpu: $chips_per_node"
  else
    selector="cloud.google.com/gke-accelerator: $(json_string "$accelerator")"
    limits="nvidia.com/gpu: $gpus_per_node"
  fi
  [[ ! $spot ]] || selector+=', cloud.google.com/gke-spot: "true"'
  [[ ! $cpu ]] || limits+=", cpu: $(json_string "$cpu")"
  [[ ! $memory ]] || limits+=", memory: $(json_string "$memory")"
  args=$(json_list "$command" "${HMAR_ARGS[@]}")
  # TPU processes discover each other. GPU processes get the coordinator's address, or their part of
  # the files; Kubernetes replaces $(POD_NUMBER).
  if [[ ! $tpu && $command == tokenize ]]; then
    ((nodes == 1)) || args="${args%]}, \"--part=\$(POD_NUMBER)/$nodes\"]"
  elif [[ ! $tpu ]] && ((nodes == 1)); then
    args="${args%]}, \"--num_processes=1\"]"
  elif [[ ! $tpu ]]; then
    args="${args%]}, $(json_string "--coordinator=$name-workers-0-0.$name:12355")"
    args+=", \"--num_processes=$nodes\", \"--process_id=\$(POD_NUMBER)\"]"
  fi
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$metadata
spec:
  failurePolicy: {maxRestarts: $restarts}
  network: {enableDNSHostnames: true, publishNotReadyAddresses: true}
  replicatedJobs:
  - name: workers
    replicas: 1
    template:
      spec:
        parallelism: $nodes
        completions: $nodes
        completionMode: Indexed
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            nodeSelector: {$selector}
YAML
  [[ ! $service_account ]] ||
    echo "            serviceAccountName: $(json_string "$service_account")"
  [[ ! $spot ]] || cat <<YAML
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
YAML
  cat <<YAML
            volumes: [{name: shared-memory, emptyDir: {medium: Memory}}]
            containers:
            - name: hmar
              image: $(json_string "$image")
              command: $(json_list /bin/sh -c "$POD_SCRIPT" hmar)
              args: $args
              env:
              - name: POD_NUMBER
                valueFrom:
                  fieldRef:
                    fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"
YAML
  # A name must be unique: of several values, the last one counts.
  local -A values=()
  for pair in "${env[@]}"; do
    values[${pair%%=*}]=${pair#*=}
  done
  for pair in "${env[@]}"; do
    key=${pair%%=*}
    [[ ${values[$key]+set} ]] || continue
    echo "              - name: $key"
    echo "                value: $(json_string "${values[$key]//\$/\$\$}")"
    unset "values[$key]"
  done
  cat <<YAML
              resources: {limits: {$limits}}
              volumeMounts: [{name: shared-memory, mountPath: /dev/shm}]
YAML
}

# follow_log: follows the log of the first pod.
follow_log() {
  local pods="" selector="jobset.sigs.k8s.io/jobset-name=$name"
  selector="--selector=$selector,batch.kubernetes.io/job-completion-index=0"
  while [[ ! $DRY_RUN && ! $pods ]]; do # kubectl logs exits at once if there is no pod yet
    pods=$("${kubectl[@]}" get pods "$selector" --output=name) || exit
    [[ $pods ]] || sleep "${HMAR_POLL_SECONDS:-10}"
  done
  run "${kubectl[@]}" logs --follow --pod-running-timeout=24h "$selector"
}

case $action in
  logs) follow_log ;;
  status)
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
    ;;
  delete) run "${kubectl[@]}" delete jobset "$name" ;;
  run)
    require_options image
    [[ $accelerator || $topology ]] || require_options accelerator
    require_hmar_args
    require_key_value "${env[@]}"
    for word in "${HMAR_ARGS[@]}" "${env[@]}" "$image" "$accelerator" "$service_account" \
      "$queue" "$cpu" "$memory"; do
      [[ ! ${word//[$'\n\t']/} =~ [[:cntrl:]] ]] ||
        die "arguments must not contain control characters; got $(printf %q "$word")"
    done
    require_positive_int grace
    [[ $restarts == 0 ]] || require_positive_int restarts
    tpu=""
    if [[ $accelerator == nvidia-* ]]; then
      [[ ! $topology && ! $chips_per_node ]] ||
        die "--topology and --chips_per_node are for TPUs; for GPUs, give --nodes and" \
          "--gpus_per_node"
      require_options nodes gpus_per_node
      require_positive_int nodes gpus_per_node
      env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
    else
      tpu=1
      [[ ! $nodes && ! $gpus_per_node ]] ||
        die "--nodes and --gpus_per_node are for GPUs, nvidia-...; the number of TPUs follows from" \
          "the slice"
      [[ $topology ]] || ! find_tpu "$accelerator" || require_options topology
      # shellcheck disable=SC2034  # used by slices.sh
      SLICE_HINT="or a GPU type of GKE, nvidia-..."
      parse_slice_options
      if [[ ! $chips_per_node ]]; then
        chips_per_node=$((SLICE_CHIPS < 4 ? SLICE_CHIPS : 4))
        [[ $SLICE_TOPOLOGY != 2x4 ]] || chips_per_node=8
      fi
      require_positive_int chips_per_node
      ((SLICE_CHIPS % chips_per_node == 0)) || die "--chips_per_node must divide the $SLICE_CHIPS" \
        "chips of $SLICE_TOPOLOGY; got $chips_per_node"
      nodes=$((SLICE_CHIPS / chips_per_node))
      env=("JAX_PLATFORMS=tpu,cpu" "${env[@]}")
    fi
    ((nodes == 1)) || refuse_hmar_args "the processes find each other and divide the work" \
      coordinator num_processes process_id local_devices part
    for pair in "${env[@]}"; do
      [[ $pair != POD_NUMBER=* ]] || die "--env=POD_NUMBER is set by gke.sh"
    done
    output=$(get_hmar_arg "$output_option")
    [[ $output == gs://* || $output == /* ]] ||
      die "--$output_option must be gs://BUCKET/DIR or a mounted /DIR, because a pod's own files" \
        "are deleted with it; got $output"
    yaml=$(make_jobset)
    if [[ $DRY_RUN ]]; then
      printf '%s\n' "$yaml"
      run "${kubectl[@]}" apply --filename=-
    else
      # NAME:STATE of the existing JobSet; STATE is empty while it runs.
      if existing=$("${kubectl[@]}" get jobset "$name" --ignore-not-found \
        '--output=jsonpath={.metadata.name}:{.status.terminalState}'); then
        case $existing in
          "") ;;
          "$name:")
            info "JobSet $name is already running and is left unchanged"
            [[ $detach ]] || follow_log
            exit 0
            ;;
          *)
            info "JobSet $name has ended (${existing#*:}); replacing it to resume the run"
            "${kubectl[@]}" delete jobset "$name" --wait=true
            ;;
        esac
      else
        exit 1
      fi
      printf '%s\n' "$yaml" | "${kubectl[@]}" apply --filename=-
    fi
    [[ $detach ]] || follow_log
    ;;
esac
