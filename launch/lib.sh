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
# to an array. The arguments after "--" are stored in the array HMAR_ARGS. --command, --help and
# --dry-run always exist.
parse_options() {
  # The underscores keep these local variables from shadowing the caller's option variables.
  local _arg _name _value _spec _given=" "
  HMAR_ARGS=() command=train
  set -- "$@" command
  while ((${#ARGS[@]})); do
    _arg=${ARGS[0]}
    ARGS=("${ARGS[@]:1}")
    case $_arg in
      --) HMAR_ARGS=("${ARGS[@]}"); break ;;
      --help | -h) show_help; exit 0 ;;
      --dry-run | --dry_run) DRY_RUN=1; continue ;;
      --?*) ;;
      *) die "unexpected argument '$_arg'; options have the form --NAME=VALUE," \
        "and the arguments of hmar follow --" ;;
    esac
    _name=${_arg#--}
    _name=${_name%%=*}
    _name=${_name//-/_}
    for _spec in "$@" ""; do
      [[ ${_spec%[+!]} == "$_name" ]] && break
    done
    [[ $_spec ]] || die "unknown option --$_name; valid options:" \
      "$(printf -- '--%s ' "${@%[+!]}")--dry-run --help; the arguments of hmar follow --"
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
      [[ $_given != *" $_name "* || ${!_name} == "$_value" ]] ||
        die "--$_name is given twice: ${!_name} and $_value"
      _given+="$_name "
      printf -v "$_name" '%s' "$_value"
    fi
  done
  require_choice --command train train-tokenizer tokenize
  # hmar would refuse these only after the job has started.
  for _arg in "${HMAR_ARGS[@]}"; do
    _name=${_arg#--}
    _name=${_name%%=*}
    _name=${_name//-/_}
    for _spec in "$@" dry_run; do
      [[ $_arg != --?* || ${_spec%[+!]} != "$_name" ]] ||
        die "--${_arg#--} is an option of ${0##*/}: give it before --"
    done
    [[ $_arg != -- ]] || die "unexpected second --"
  done
  [[ ! ${HMAR_ARGS[*]} || ${HMAR_ARGS[0]} == --* ]] ||
    die "the arguments after -- must be options of hmar $command; got ${HMAR_ARGS[0]}" \
      "(--command=COMMAND before -- selects the command)"
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

# require_choice [--]NAME VALUE...: the variable NAME must hold one of the values.
require_choice() {
  local _label=$1 _name=${1#--} _value
  shift
  for _value in "$@"; do
    [[ ${!_name} != "$_value" ]] || return 0
  done
  die "$_label must be one of: $*; got ${!_name}"
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

# expand_home NAME...: a path of this machine may begin with ~/, which a shell expands only at the
# beginning of a word.
expand_home() {
  local _name
  for _name in "$@"; do
    [[ ! ${!_name} =~ ^\~(/|$) ]] || printf -v "$_name" '%s' "$HOME${!_name:1}"
  done
}

# require_hmar_args: HMAR_ARGS must hold the options that the command requires, once each. Without
# this check the error would appear only after the job has started. Sets output_option.
require_hmar_args() {
  local required word option count
  if [[ $command == tokenize ]]; then
    required="tokenizer data" output_option=out
  else
    required="config" output_option=workdir
  fi
  ((${#HMAR_ARGS[@]})) || die "requires the arguments of hmar $command after --, for example: --" \
    "$([[ $command == tokenize ]] && echo "--tokenizer=RUN --data=folder:DIR --out=DIR" ||
      echo "--config=configs/FILE.py:NAME --workdir=DIR")"
  for option in $required $output_option; do
    count=0
    for word in "${HMAR_ARGS[@]}"; do
      [[ ${word%%=*} != "--$option" ]] || count=$((count + 1))
    done
    ((count)) || die "hmar $command requires --${required// / and --} and --$output_option;" \
      "give them after --"
    ((count == 1)) || die "--$option must be given once after --; got it $count times"
  done
  [[ $(get_hmar_arg "$output_option") ]] || die "--$output_option must not be empty"
}

# get_hmar_arg NAME: prints the value of --NAME in HMAR_ARGS, nothing without it.
get_hmar_arg() {
  local i
  for ((i = 0; i < ${#HMAR_ARGS[@]}; i++)); do
    case ${HMAR_ARGS[i]} in
      "--$1="*) printf '%s' "${HMAR_ARGS[i]#*=}" ;;
      "--$1") printf '%s' "${HMAR_ARGS[i + 1]:-}" ;;
    esac
  done
}

# refuse_hmar_args REASON NAME...: HMAR_ARGS must not hold these options.
refuse_hmar_args() {
  local reason=$1 word option
  shift
  for word in "${HMAR_ARGS[@]}"; do
    for option in "$@"; do
      [[ ${word%%=*} != "--$option" ]] || die "--$option must not be given after --: $reason"
    done
  done
}

# is_stop_status STATUS: that of a process that saved and ended on HUP, INT or TERM.
is_stop_status() {
  (($1 == 129 || $1 == 130 || $1 == 143))
}
