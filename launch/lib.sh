# shellcheck shell=bash
# What the scripts beside this file share. Sourced, never run.

DRY_RUN="" # --dry-run: commands are printed, none is run

# needs_bash MAJOR MINOR: what the script at hand uses is in no older one (macOS comes with 3.2).
needs_bash() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= $1 * 100 + $2)) || {
    printf '%s: bash %s.%s or newer is wanted, this is %s\n' "${0##*/}" "$1" "$2" "$BASH_VERSION" >&2
    exit 2
  }
}

# The comment at the top of the calling script is its help.
show_help() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

# What the user gave is wrong: one line, exit status 2.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

note() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# quoted WORD…: as one would type it into a shell, to the same words.
quoted() {
  local word text=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_/.,:=@%+-]+$ ]]; then
      text+=" $word"
    else
      text+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${text# }"
}

# run COMMAND…: runs it, or with --dry-run prints it.
run() {
  if [[ $DRY_RUN ]]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# need COMMAND: it is on PATH, or this is a dry run.
need() {
  [[ $DRY_RUN ]] || command -v "$1" >/dev/null || die "the command $1 is not on PATH; it is needed here (--dry-run goes without)"
}

# options_of NAME…: reads the words of the array WORDS into shell variables, up to "--".
#
# A name "zone" is an option --zone=VALUE or --zone VALUE and sets $zone; "spot!" is a switch that sets $spot to 1;
# "env+" may come several times and makes an array. What follows "--" lands in the array TRAIN.
# --help and --dry-run are known everywhere.
options_of() {
  # No plain names for what is local: it would hide the caller's variables of the options.
  local _word _name _value _known
  TRAIN=()
  while ((${#WORDS[@]})); do
    _word=${WORDS[0]}
    WORDS=("${WORDS[@]:1}")
    case $_word in
      --) TRAIN=("${WORDS[@]}"); return ;;
      --help | -h) show_help; exit 0 ;;
      --dry-run | --dry_run) DRY_RUN=1; continue ;;
      --?*) ;;
      *) die "unexpected argument '$_word': options look like --name=value, and what hmar train gets comes after --" ;;
    esac
    _name=${_word#--}
    _name=${_name%%=*}
    _name=${_name//-/_}
    for _known in "$@" ""; do
      [[ ${_known%[+!]} == "$_name" ]] && break
    done
    [[ $_known ]] || die "unknown option --$_name: known are $(printf -- '--%s ' "${@%[+!]}")--dry-run --help; what hmar train gets comes after --"
    if [[ $_known == *! ]]; then
      [[ $_word != *=* ]] || die "--$_name is a switch and takes no value"
      printf -v "$_name" 1
      continue
    fi
    if [[ $_word == *=* ]]; then
      _value=${_word#*=}
    else
      ((${#WORDS[@]})) && [[ ${WORDS[0]} != --* ]] || die "--$_name wants a value: --$_name=VALUE"
      _value=${WORDS[0]}
      WORDS=("${WORDS[@]:1}")
    fi
    [[ $_value ]] || die "--$_name is empty: --$_name=VALUE"
    if [[ $_known == *+ ]]; then
      local -n _list=$_name
      _list+=("$_value")
      unset -n _list
    else
      printf -v "$_name" '%s' "$_value"
    fi
  done
}

# required NAME…: each has been given.
required() {
  local _name
  for _name in "$@"; do
    [[ ${!_name} ]] || die "--$_name is missing (see --help)"
  done
}

# whole NAME…: each is a whole number of 1 or more.
whole() {
  local _name
  for _name in "$@"; do
    [[ ${!_name} =~ ^[1-9][0-9]*$ ]] || die "--$_name=${!_name}: a whole number of 1 or more is wanted"
  done
}

# one_of NAME VALUE…
one_of() {
  local _name=$1 _value
  shift
  for _value in "$@"; do
    [[ ${!_name} != "$_value" ]] || return 0
  done
  die "$_name ${!_name}: known are $*"
}

# plain_name NAME: as Google Cloud and Kubernetes want names of things.
plain_name() {
  [[ ${!1} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--$1=${!1}: lower-case letters, digits and -, from a letter on, 40 at most are wanted"
}

# environment KEY=VALUE…: all are such.
environment() {
  local pair
  for pair in "$@"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env=$pair: KEY=VALUE is wanted"
  done
}

# train_arguments: TRAIN has what every run needs, and nothing that would be caught too late.
train_arguments() {
  ((${#TRAIN[@]})) || die "nothing to train: give the arguments of hmar train after --, such as -- --config=configs/hmar.py:d16_256 --workdir=DIR"
  local word missing="--config --workdir"
  for word in "${TRAIN[@]}"; do
    missing=" $missing "
    missing=${missing/ ${word%%=*} / }
  done
  missing=${missing// /}
  [[ ! $missing ]] || die "hmar train needs --config and --workdir: give both after --"
}

# The value of --workdir among the arguments of hmar train.
workdir_of() {
  local i
  for ((i = 0; i < ${#TRAIN[@]}; i++)); do
    case ${TRAIN[i]} in
      --workdir=*) printf '%s' "${TRAIN[i]#*=}" ;;
      --workdir) printf '%s' "${TRAIN[i + 1]:-}" ;;
    esac
  done
}
