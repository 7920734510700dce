#!/usr/bin/env bash
# Trains on a Kubernetes cluster with TPUs or GPUs (GKE), as a JobSet.
#
#   launch/gke.sh run --name=NAME --image=IMAGE --accelerator=TYPE --topology=AxB[xC] [OPTION…] -- ARGUMENTS OF hmar train
#   launch/gke.sh run --name=NAME --image=IMAGE --accelerator=TYPE --nodes=N --gpus_per_node=N [OPTION…] -- ARGUMENTS …
#   launch/gke.sh logs|status|delete --name=NAME [--namespace= --context=]
#
#   launch/gke.sh run --name=d30 --image=REGISTRY/hmar --accelerator=v5p --topology=4x4x4 -- \
#     --config=configs/hmar.py:d30_256 --workdir=gs://BUCKET/d30 --config.data.source=tokens:gs://BUCKET/tokens
#
# run      applies the JobSet and follows the log of its first pod. One of this name that has ended is replaced, and the run
#          goes on where it was; one that is going is left alone.
# logs     follows that log      status  the JobSet and its pods      delete  ends it: the run saves, the pods go
#
#   --image=IMAGE            has hmar on its PATH (launch/Dockerfile makes one)
#   --accelerator=TYPE       v4, v5e, v5p, v6e; or a GPU as GKE names it, such as nvidia-h100-80gb
#   --topology=AxB[xC]       of the TPU slice; hmar plan takes the same
#   --chips_per_node=N       of a TPU (default: 4; 8 for v5e:2x4 and v6e:2x4; all of a smaller slice)
#   --nodes=N --gpus_per_node=N
#                            of GPUs; one process for each node
#   --namespace= --context=  as kubectl takes them
#   --service_account=NAME   of the pods, with access to the bucket (Workload Identity)
#   --queue=NAME             a local queue of Kueue
#   --spot                   on spot nodes
#   --cpu= --memory=         to ask for beside the accelerators, such as --memory=300Gi
#   --restarts=N             how often a run that failed or lost a node is begun again (default 100); it goes on each time
#   --grace=SECONDS          to save when a pod is told to end (default 300)
#   --env=KEY=VALUE          for the environment of hmar train; may come several times
#   --detach                 do not follow the log
#   --dry-run                print the JobSet and the commands, run nothing
#
# Needs kubectl, and JobSet installed in the cluster.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs_bash 4 4

[[ ${1:-} && ${1:-} != -* ]] && command=$1 && shift || command=""
name="" image="" accelerator="" topology="" chips_per_node="" nodes="" gpus_per_node="" namespace="" context="" service_account=""
queue="" spot="" cpu="" memory="" restarts=100 grace=300 env=() detach=""
WORDS=("$@")
options_of name image accelerator topology chips_per_node nodes gpus_per_node namespace context service_account queue spot! \
  cpu memory restarts grace env+ detach!
[[ $command ]] || die "a command is missing: run, logs, status or delete"
one_of command run logs status delete
required name
plain_name name
[[ $command == run ]] || ((!${#TRAIN[@]})) || die "$command takes no arguments of hmar train"
need kubectl
kubectl=(kubectl)
[[ ! $context ]] || kubectl+=("--context=$context")
[[ ! $namespace ]] || kubectl+=("--namespace=$namespace")

# text WORD: as a JSON string, which YAML reads too. Control characters have been refused.
text() {
  local s=$1
  s=${s//\\/\\\\}
  s=${s//\"/\\\"}
  s=${s//$'\n'/\\n}
  s=${s//$'\t'/\\t}
  printf '"%s"' "$s"
}

# words WORD…: a list of them, in which Kubernetes must not look for variables: to it $$ is one $.
words() {
  local word all=""
  for word in "$@"; do
    all+=", $(text "${word//\$/\$\$}")"
  done
  printf '[%s]' "${all#, }"
}

# What each pod runs. hmar train ends well when told to save; then the pod must not count as done.
# shellcheck disable=SC2016  # for the shell of the pod
PROGRAM='told=; trap "told=1; kill -TERM \$!" TERM
hmar train "$@" & while :; do wait $!; status=$?; kill -0 $! 2>/dev/null || break; done
[ -z "$told" ] || [ $status != 0 ] || status=143; exit $status'

jobset() {
  local pair more="" selector limits args
  [[ ! $queue ]] || more="
  labels: {kueue.x-k8s.io/queue-name: $(text "$queue")}"
  if [[ $topology ]]; then
    more+="
  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}" # a slice of several hosts is a node pool
    selector="cloud.google.com/gke-tpu-accelerator: $(text "$gke_accelerator"), cloud.google.com/gke-tpu-topology: $(text "$topology")"
    limits="google.com/tpu: $chips_per_node"
  else
    selector="cloud.google.com/gke-accelerator: $(text "$accelerator")"
    limits="nvidia.com/gpu: $gpus_per_node"
  fi
  [[ ! $spot ]] || selector+=', cloud.google.com/gke-spot: "true"'
  [[ ! $cpu ]] || limits+=", cpu: $(text "$cpu")"
  [[ ! $memory ]] || limits+=", memory: $(text "$memory")"
  args=$(words "${TRAIN[@]}")
  if [[ ! $topology ]] && ((nodes == 1)); then
    args="${args%]}, \"--num_processes=1\"]"
  elif [[ ! $topology ]]; then # TPUs find each other; of these, Kubernetes fills in the pod's number
    args="${args%]}, $(text "--coordinator=$name-workers-0-0.$name:12355"), \"--num_processes=$nodes\", \"--process_id=\$(POD_NUMBER)\"]"
  fi
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name$more
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
  [[ ! $service_account ]] || echo "            serviceAccountName: $(text "$service_account")"
  [[ ! $spot ]] || echo '            tolerations: [{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}]'
  cat <<YAML
            volumes: [{name: shared-memory, emptyDir: {medium: Memory}}]
            containers:
            - name: hmar
              image: $(text "$image")
              command: $(words /bin/sh -c "$PROGRAM" hmar)
              args: $args
              env:
              - {name: POD_NUMBER, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}}
YAML
  for pair in "${env[@]}"; do
    echo "              - {name: ${pair%%=*}, value: $(pair=${pair#*=}; text "${pair//\$/\$\$}")}"
  done
  cat <<YAML
              resources: {limits: {$limits}}
              volumeMounts: [{name: shared-memory, mountPath: /dev/shm}]
YAML
}

follow() {
  local pods="" selector="--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
  while [[ ! $DRY_RUN && ! $pods ]]; do # of none, kubectl shows the log and ends
    pods=$("${kubectl[@]}" get pods "$selector" --output=name) || exit
    [[ $pods ]] || sleep "${HMAR_POLL_SECONDS:-10}"
  done
  run "${kubectl[@]}" logs --follow --pod-running-timeout=24h "$selector"
}

case $command in
  logs) follow ;;
  status)
    run "${kubectl[@]}" get jobset "$name"
    run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
    ;;
  delete) run "${kubectl[@]}" delete jobset "$name" ;;
  run)
    required image accelerator
    train_arguments
    environment "${env[@]}"
    for word in "${TRAIN[@]}" "${env[@]}" "$image" "$accelerator" "$service_account" "$queue" "$cpu" "$memory"; do
      [[ ! ${word//[$'\n\t']/} =~ [[:cntrl:]] ]] || die "a control character in $(printf %q "$word")"
    done
    whole grace
    [[ $restarts == 0 ]] || whole restarts
    gke_accelerator=""
    case $accelerator in
      v4) gke_accelerator=tpu-v4-podslice ;;
      v5e) gke_accelerator=tpu-v5-lite-podslice ;;
      v5p) gke_accelerator=tpu-v5p-slice ;;
      v6e) gke_accelerator=tpu-v6e-slice ;;
      nvidia-*) ;;
      *) die "--accelerator=$accelerator: known are v4, v5e, v5p, v6e, and GPUs as GKE names them, nvidia-…" ;;
    esac
    if [[ $gke_accelerator ]]; then
      [[ ! $nodes && ! $gpus_per_node ]] || die "--nodes and --gpus_per_node are for GPUs: of TPUs the topology says them"
      required topology
      [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "--topology=$topology: AxB or AxBxC is wanted, such as 8x8 (v5e, v6e) or 4x4x4 (v4, v5p)"
      dimensions=${topology//[0-9]/}
      case $accelerator in
        v5e | v6e) ((${#dimensions} == 1)) || die "--topology=$topology: $accelerator slices are flat, AxB" ;;
        *) ((${#dimensions} == 2)) || die "--topology=$topology: $accelerator slices are AxBxC" ;;
      esac
      chips=$((${topology//x/ * }))
      if [[ ! $chips_per_node ]]; then
        chips_per_node=$((chips < 4 ? chips : 4))
        [[ $topology != 2x4 ]] || chips_per_node=8
      fi
      whole chips_per_node
      ((chips % chips_per_node == 0)) || die "--chips_per_node=$chips_per_node does not divide the $chips chips of $topology"
      nodes=$((chips / chips_per_node))
      env=("JAX_PLATFORMS=tpu,cpu" "${env[@]}")
    else
      [[ ! $topology && ! $chips_per_node ]] || die "--topology and --chips_per_node are for TPUs: for GPUs give --nodes and --gpus_per_node"
      required nodes gpus_per_node
      whole nodes gpus_per_node
      env=("JAX_PLATFORMS=cuda,cpu" "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92" "${env[@]}")
    fi
    workdir=$(workdir_of)
    [[ $workdir == gs://* || $workdir == /* ]] || die "--workdir=$workdir: a pod's own folders vanish with it; gs://BUCKET/DIR or a mounted /DIR is wanted"
    yaml=$(jobset)
    if [[ $DRY_RUN ]]; then
      printf '%s\n' "$yaml"
      run "${kubectl[@]}" apply --filename=-
    else
      if ended=$("${kubectl[@]}" get jobset "$name" --ignore-not-found '--output=jsonpath={.metadata.name}:{.status.terminalState}'); then
        case $ended in
          "") ;;
          "$name:") note "$name is going already: showing its log" && { [[ $detach ]] || follow; } && exit 0 ;;
          *)
            note "an earlier $name has ended (${ended#*:}): replacing it, the run goes on where it was"
            "${kubectl[@]}" delete jobset "$name" --wait=true
            ;;
        esac
      else
        exit 1
      fi
      printf '%s\n' "$yaml" | "${kubectl[@]}" apply --filename=-
    fi
    [[ $detach ]] || follow
    ;;
esac
