# shellcheck shell=bash
# Names of TPU slices, for tpu_pod.sh and gke.sh. This file is sourced after lib.sh, not executed.
#
# hmar plan knows the same slices by the same names (hmar_jax/planning/topology.py);
# tests/test_launch.py compares the two. A slice has these names:
#   v5p:4x4x4              chip and topology, as for hmar plan
#   v5p:64                 chip and number of chips
#   v5p-128, v5litepod-8   accelerator type of Cloud TPU; v4, v5p and tpu7x count two cores per chip
#   tpu-v5p-slice:4x4x4    label of GKE and topology
# Of v4, v5p and tpu7x there are also topologies of whole cubes: AxBxC in ascending order, all
# multiples of 4, not larger than the last one of the table.

# CHIP LABEL_OF_GKE TYPE_OF_CLOUD_TPU CORES_PER_CHIP TOPOLOGY...
SLICE_TABLE="\
v4 tpu-v4-podslice v4 2 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 12x16x16
v5e tpu-v5-lite-podslice v5litepod 1 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
v5p tpu-v5p-slice v5p 2 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24
v6e tpu-v6e-slice v6e 1 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16
tpu7x tpu7x tpu7x 2 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16"

# find_tpu NAME: NAME is a chip, GKE's label or Cloud TPU's type. Sets SLICE_CHIP, SLICE_LABEL,
# slice_prefix, slice_cores (per chip) and the array slice_topologies; fails for other names.
find_tpu() {
  while read -r SLICE_CHIP SLICE_LABEL slice_prefix slice_cores slice_topologies; do
    [[ $1 != "$SLICE_CHIP" && $1 != "$SLICE_LABEL" && $1 != "$slice_prefix" ]] || return 0
  done <<<"$SLICE_TABLE"
  return 1
}

# is_cube TOPOLOGY: one of whole cubes, of a chip of find_tpu.
is_cube() {
  local sides largest i previous=4
  IFS=x read -r -a sides <<<"$1"
  IFS=x read -r -a largest <<<"${slice_topologies##* }"
  ((${#sides[@]} == 3 && ${#largest[@]} == 3)) || return 1
  for i in 0 1 2; do
    ((sides[i] % 4 == 0 && sides[i] >= previous && sides[i] <= largest[i])) || return 1
    previous=${sides[i]}
  done
}

# parse_slice OPTION NAME: sets SLICE_CHIP (v5p), SLICE_TOPOLOGY (4x4x4), SLICE_CHIPS (64),
# SLICE_LABEL (tpu-v5p-slice) and SLICE_TYPE (v5p-128; empty if the type would give another
# topology of as many chips). OPTION is named in errors, and $SLICE_HINT for an unknown chip.
# shellcheck disable=SC2034  # used by the calling script
parse_slice() {
  local text=${2,,} name size topology counted
  case $text in
    *:*) name=${text%%:*} size=${text#*:} counted=chips ;;
    *) name=${text%-*} size=${text##*-} counted=cores ;;
  esac
  find_tpu "$name" || die "$1: unknown TPU slice $2; known chips: $(list_tpus), such as v5e:2x4," \
    "v5e:8 (chips) or v5litepod-8${SLICE_HINT:+; $SLICE_HINT}"
  SLICE_TOPOLOGY=""
  for topology in $slice_topologies; do
    SLICE_CHIPS=$((${topology//x/ * }))
    SLICE_TYPE=$slice_prefix-$((SLICE_CHIPS * slice_cores))
    case $counted in
      chips) [[ $size == "$topology" || $size == "$SLICE_CHIPS" ]] || continue ;;
      cores) [[ $size == $((SLICE_CHIPS * slice_cores)) ]] || continue ;;
    esac
    SLICE_TOPOLOGY=$topology
    return
  done
  if [[ $counted == chips && $size =~ ^[1-9][0-9]?(x[1-9][0-9]?){2}$ ]] && is_cube "$size"; then
    SLICE_TOPOLOGY=$size SLICE_CHIPS=$((${size//x/ * })) SLICE_TYPE=""
    return
  fi
  die "$1: there is no TPU slice $2; known: $(list_slices)"
}

# list_tpus: prints the chips.
list_tpus() {
  local chip rest chips=""
  while read -r chip rest; do
    chips+=" $chip"
  done <<<"$SLICE_TABLE"
  printf '%s' "${chips# }"
}

# list_slices: prints the slices of the chip of find_tpu, by two names each.
list_slices() {
  local topology all=""
  for topology in $slice_topologies; do
    all+=", $SLICE_CHIP:$topology ($slice_prefix-$((${topology//x/ * } * slice_cores)))"
  done
  [[ ${slice_topologies##* } != *x*x* ]] || all+="; or larger cubes, such as $SLICE_CHIP:4x4x12"
  printf '%s' "${all#, }"
}

# parse_slice_options: the slice of --accelerator and --topology. The second completes the first
# (v5p and 4x4x4) or names the same slice.
parse_slice_options() {
  local found
  # shellcheck disable=SC2154  # the options of the calling script
  if [[ ! $topology ]]; then
    parse_slice --accelerator "$accelerator"
  elif [[ ! $accelerator ]]; then
    parse_slice --topology "$topology"
  elif find_tpu "${accelerator,,}"; then
    [[ $topology == *:* || $topology == *-* ]] || topology="$accelerator:$topology"
    found=$SLICE_CHIP
    parse_slice --topology "$topology"
    [[ $SLICE_CHIP == "$found" ]] ||
      die "--accelerator and --topology must name the same slice; got $accelerator and $topology"
  else
    parse_slice --accelerator "$accelerator"
    found=$SLICE_CHIP:$SLICE_TOPOLOGY
    [[ $topology == *:* || $topology == *-* ]] || topology="$SLICE_CHIP:$topology"
    parse_slice --topology "$topology"
    [[ $SLICE_CHIP:$SLICE_TOPOLOGY == "$found" ]] ||
      die "--accelerator and --topology must name the same slice; got $accelerator and $topology"
  fi
}
