# shellcheck shell=bash
# Functions shared by the launch scripts. This file is sourced, not executed.

DRY_RUN="" # set by --dry-run: print the commands instead of executing them

# require_bash MAJOR MINOR: the calling script uses features of this version (macOS ships 3.2).
require_bash() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= $1 * 100 + $2)) || {
    printf '%s: requires bash %s.%s or newer; got %s\n' "${0##*/}" "$1" "$2" "$BASH_VERSION" >&2
    exit 2
  }
}

# show_help: prints the comment at the top of the calling script.
show_help() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
}

# die MESSAGE...: reports an error in the user's input in one line and exits with status 2.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# info MESSAGE...: prints a progress message to standard error.
info() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# shell_quote WORD...: prints the words quoted so that a shell parses them back unchanged.
shell_quote() {
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

# run COMMAND...: executes the command; with --dry-run, prints it.
run() {
  if [[ $DRY_RUN ]]; then
    shell_quote "$@"
    printf '\n'
  else
    "$@"
  fi
}

# require_command NAME: NAME must be on PATH, except with --dry-run.
require_command() {
  [[ $DRY_RUN ]] || command -v "$1" >/dev/null ||
    die "requires the command $1, which is not on PATH (--dry-run does not need it)"
}

# parse_options NAME...: parses the array ARGS up to "--" into shell variables.
#
# The name "zone" declares the option --zone=VALUE or --zone VALUE, which sets $zone. "spot!"
# declares a flag that sets $spot to 1. "env+" declares an option that can be repeated and appends
# to an array. The arguments after "--" are stored in the array TRAIN_ARGS. --help and --dry-run
# always exist.
parse_options() {
  # The underscores keep these local variables from shadowing the caller's option variables.
  local _arg _name _value _spec
  TRAIN_ARGS=()
  while ((${#ARGS[@]})); do
    _arg=${ARGS[0]}
    ARGS=("${ARGS[@]:1}")
    case $_arg in
      --) TRAIN_ARGS=("${ARGS[@]}"); return ;;
      --help | -h) show_help; exit 0 ;;
      --dry-run | --dry_run) DRY_RUN=1; continue ;;
      --?*) ;;
      *) die "unexpected argument '$_arg'; options have the form --NAME=VALUE," \
        "and the arguments of hmar train follow --" ;;
    esac
    _name=${_arg#--}
    _name=${_name%%=*}
    _name=${_name//-/_}
    for _spec in "$@" ""; do
      [[ ${_spec%[+!]} == "$_name" ]] && break
    done
    [[ $_spec ]] || die "unknown option --$_name; valid options:" \
      "$(printf -- '--%s ' "${@%[+!]}")--dry-run --help; the arguments of hmar train follow --"
    if [[ $_spec == *! ]]; then
      [[ $_arg != *=* ]] || die "--$_name is a flag and takes no value; got $_arg"
      printf -v "$_name" 1
      continue
    fi
    if [[ $_arg == *=* ]]; then
      _value=${_arg#*=}
    else
      ((${#ARGS[@]})) && [[ ${ARGS[0]} != --* ]] || die "--$_name requires a value: --$_name=VALUE"
      _value=${ARGS[0]}
      ARGS=("${ARGS[@]:1}")
    fi
    [[ $_value ]] || die "--$_name must not be empty: --$_name=VALUE"
    if [[ $_spec == *+ ]]; then
      local -n _list=$_name
      _list+=("$_value")
      unset -n _list
    else
      printf -v "$_name" '%s' "$_value"
    fi
  done
}

# require_options NAME...: each option must have been given.
require_options() {
  local _name
  for _name in "$@"; do
    [[ ${!_name} ]] || die "--$_name is required (see --help)"
  done
}

# require_positive_int NAME...: the value of each option must be an integer of 1 or more.
require_positive_int() {
  local _name
  for _name in "$@"; do
    [[ ${!_name} =~ ^[1-9][0-9]*$ ]] || die "--$_name must be a positive integer; got ${!_name}"
  done
}

# require_choice NAME VALUE...: the variable NAME must hold one of the values.
require_choice() {
  local _name=$1 _value
  shift
  for _value in "$@"; do
    [[ ${!_name} != "$_value" ]] || return 0
  done
  die "$_name must be one of: $*; got ${!_name}"
}

# require_resource_name NAME: the value must be a valid name in Google Cloud and Kubernetes.
require_resource_name() {
  [[ ${!1} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$1 must start with a letter, contain only lower-case letters, digits and -," \
      "not end with -, and have at most 40 characters; got ${!1}"
}

# require_key_value KEY=VALUE...: each argument must assign an environment variable.
require_key_value() {
  local pair
  for pair in "$@"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env must have the form KEY=VALUE; got $pair"
  done
}

# require_train_args: TRAIN_ARGS must hold --config and --workdir, which every run needs.
# Without this check the error would appear only after the job has started.
require_train_args() {
  ((${#TRAIN_ARGS[@]})) || die "requires the arguments of hmar train after --," \
    "for example: -- --config=configs/hmar.py:d16_256 --workdir=DIR"
  local word missing="--config --workdir"
  for word in "${TRAIN_ARGS[@]}"; do
    missing=" $missing "
    missing=${missing/ ${word%%=*} / }
  done
  missing=${missing// /}
  [[ ! $missing ]] || die "hmar train requires --config and --workdir; give both after --"
}

# get_workdir: prints the value of --workdir in TRAIN_ARGS.
get_workdir() {
  local i
  for ((i = 0; i < ${#TRAIN_ARGS[@]}; i++)); do
    case ${TRAIN_ARGS[i]} in
      --workdir=*) printf '%s' "${TRAIN_ARGS[i]#*=}" ;;
      --workdir) printf '%s' "${TRAIN_ARGS[i + 1]:-}" ;;
    esac
  done
}
