# Shared by slurm/*.sh: what Slurm gave, the job's steps, its servers, signals, requeue. Sourced, never run.
#
# What runs, and every command line of it, is decided by `python -m recipes.slurm` (see there and recipes/cluster.py); this
# file only starts the lines. Every AMPO_* variable may come from the environment or from slurm/site.env;
# slurm/site.env.example explains them.
# shellcheck shell=bash

set -euo pipefail

PREFLIGHT_S=120
STOPPED=75 # a stage that was asked to stop and continues with the same command
declare -A SERVER_PIDS=() # of the servers that were started, by name

say() { printf '%s %s\n' "$(date '+%F %T')" "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

show() { # words, quoted where a shell needs it
  printf '%q' "$1"
  shift
  (($# == 0)) || printf ' %q' "$@"
  echo
}

# --- settings ---------------------------------------------------------------------------------------------------

settings() {
  if [[ -f $ROOT/slurm/site.env ]]; then
    set -a
    # shellcheck disable=SC1091  # exists where somebody wrote it
    source "$ROOT/slurm/site.env"
    set +a
  fi
  export AMPO_ROOT=$ROOT
  if [[ ${AMPO_CONTAINER:-none} == none ]]; then
    if [[ ! ${AMPO_PYTHON:-} && -x $ROOT/.venv/bin/python ]]; then export AMPO_PYTHON=$ROOT/.venv/bin/python; fi
    PLAN_PYTHON=${AMPO_PLAN_PYTHON:-${AMPO_PYTHON:-python}}
  else
    PLAN_PYTHON=${AMPO_PLAN_PYTHON:-}
    [[ $PLAN_PYTHON ]] || fail "AMPO_PLAN_PYTHON: with AMPO_CONTAINER=$AMPO_CONTAINER a small Python outside of the container is needed (see docs/slurm.md)"
  fi
  local told
  told=$("$PLAN_PYTHON" -c 'import hydra, jinja2, pydantic, typer' 2>&1) ||
    fail "AMPO_PLAN_PYTHON: $PLAN_PYTHON on $(hostname): ${told##*$'\n'} (docs/slurm.md says what it needs)"
  JOB=${SLURM_HET_JOB_ID:-${SLURM_JOB_ID:-0}}
  JOB=${SLURM_JOB_ID_HET_GROUP_0:-$JOB}
  RESTART=${SLURM_RESTART_COUNT:-0}
  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
}

helper() { # MODULE ARGUMENTS...: Python that only reads and writes the run folder
  "$PLAN_PYTHON" -m "$@"
}

# What Slurm gave, as options of `recipes.slurm`.
allocation() {
  local group names
  GIVEN=(--job "$JOB" --restart "$RESTART" --cpus "${SLURM_CPUS_PER_TASK:-0}")
  if [[ ! ${SLURM_JOB_ID:-} ]]; then return; fi
  mapfile -t NODES < <(node_names "${SLURM_JOB_NODELIST_HET_GROUP_0:-${SLURM_JOB_NODELIST:-}}")
  MASTER_ADDR=$(node_address "${NODES[0]}")
  HOSTS=$MASTER_ADDR
  for ((group = 1; group < ${SLURM_HET_SIZE:-1}; group++)); do
    names=SLURM_JOB_NODELIST_HET_GROUP_$group
    HOSTS+=,$(node_address "$(node_names "${!names:-}" | head -n 1)")
  done
  export MASTER_ADDR
  GIVEN+=(--nodes "${#NODES[@]}" --hosts "$HOSTS")
}

node_names() { # of a Slurm node list
  if [[ $1 ]]; then scontrol show hostnames "$1"; else hostname; fi
}

# Several slurmd may share a host, so a node's name need not resolve; its address does.
node_address() {
  local shown
  shown=$(scontrol show node "$1" 2>/dev/null || true)
  if [[ $shown =~ NodeAddr=([^[:space:]]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo "$1"; fi
}

# --- a job ------------------------------------------------------------------------------------------------------

# open_job SCRIPT [--dry-run] [--force] [RECIPE] [key=value...]: shows the job, submits it, or learns what it runs.
open_job() {
  local script=$1 dry='' force=() recipe=configs/pipeline/tiny.yaml line facts
  shift
  while [[ ${1:-} == -* ]]; do
    case $1 in
      --dry-run) dry=1 ;;
      --force) force=(--force) ;;
      *) fail "$1: expected slurm/$script [--dry-run] [--force] [RECIPE] [key=value...]" ;;
    esac
    shift
  done
  for line in "$@"; do
    [[ $line != -* ]] || fail "$line: options stand before the recipe: slurm/$script [--dry-run] [--force] [RECIPE] [key=value...]"
  done
  cd "$ROOT"
  settings
  if [[ ${1:-} && $1 != *=* ]]; then recipe=$1 && shift; fi
  allocation
  if [[ $dry ]]; then
    helper recipes.slurm show "${GIVEN[@]}" "$script" "$recipe" "$@" || exit 2
    exit 0
  fi
  if [[ ! ${SLURM_JOB_ID:-} ]]; then
    line=$(helper recipes.slurm submit "${force[@]}" "$script" "$recipe" "$@") || exit 2
    [[ $line == sbatch\ * ]] || fail "recipes.slurm printed no sbatch line: $line"
    eval "exec $line"
  fi
  facts=$(helper recipes.slurm job "${GIVEN[@]}" "$script" "$recipe" "$@") || exit 2
  RUN='' LOGS='' PORT=0 IMAGES=() MAKE_IMAGES=() REMOVE_IMAGES=() PREFLIGHT=() STAGES=() LINES=() OUTPUTS=()
  JUDGE=() JUDGE_PORT=0 JUDGE_URL='' JUDGE_START_S=0 ROLLOUT=() ROLLOUT_MODEL='' ROLLOUT_URL='' ROLLOUT_START_S=0
  eval "$facts"
  export JUDGE_PORT # for AMPO_JUDGE_COMMAND
  trap remove_containers EXIT
}

# run_job SCRIPT [--dry-run] [--force] [RECIPE] [key=value...]: its part of the pipeline.
run_job() {
  local status=0
  open_job "$@"
  STOP='' STEP_PID='' REASON=''
  trap 'stop "asked to stop before the time limit"' USR1
  trap 'stop "asked to end"' TERM
  trap stop_if_server_died USR2
  helper recipes.slurm begin "$RUN" --job "$JOB" --restart "$RESTART" || exit 2
  mkdir -p "$LOGS"
  job_end_time
  say "job $JOB, attempt $RESTART, ${#NODES[@]} nodes (${NODES[*]}), logs in $LOGS"
  stages || status=$?
  # The end of a job reaches its steps and this shell in any order: a stage that just failed may be the first to hear of it.
  if ((status)) && [[ ! $STOP ]] && being_ended; then stop "asked to end"; fi
  if [[ $STOP ]]; then
    # Whatever a stage made of the request, or of the loss of its server: it did not finish, and another attempt may.
    REASON=$STOP status=$STOPPED
  elif ((status == STOPPED)); then
    REASON="stopped at a checkpoint before the time limit"
  fi
  finish "$status" "${REASON:-finished}"
}

# run_judge [--dry-run] [RECIPE] [key=value...]: a judge in a job of its own.
run_judge() {
  open_job judge.sh "$@"
  mkdir -p "$LOGS"
  trap 'rm -f "$RUN/judge.url"; remove_containers' EXIT
  echo "$JUDGE_URL" >"$RUN/judge.url"
  say "judge: $(show "${JUDGE[@]}")"
  "${JUDGE[@]}"
}

stages() {
  local number name output
  make_containers || return
  if ((${#JUDGE[@]})); then start_server judge "$JUDGE_URL" "$JUDGE_START_S" "${JUDGE[@]}" || return; fi
  start_rollout_server || return
  preflight || return
  for number in "${!STAGES[@]}"; do
    name=${STAGES[number]} output=${OUTPUTS[number]}
    if [[ -e $output ]]; then
      say "$name: done before ($output)"
      continue
    fi
    if [[ $STOP ]]; then return "$STOPPED"; fi
    start_rollout_server || return
    export MASTER_PORT=$((PORT + (number + 1) % 13 + 1))
    say "$name: ${LINES[number]}"
    eval "run_step ${LINES[number]}" || { local status=$? && REASON="$name failed" && hear_of_servers; return "$status"; }
    [[ -e $output ]] || { REASON="$name left no $output" && return 1; }
    say "$name: done"
  done
}

# Run a command in the background, so that signals are handled while it runs; its exit status.
run_step() {
  "$@" &
  STEP_PID=$!
  # A signal ends `wait` early: wait again until the process is gone.
  while kill -0 "$STEP_PID" 2>/dev/null; do wait "$STEP_PID" || true; done
  local status=0
  wait "$STEP_PID" || status=$?
  STEP_PID=''
  return "$status"
}

stop() {
  if [[ ! $STOP ]]; then say "$1"; fi
  STOP=${STOP:-$1}
  if [[ $STEP_PID ]]; then kill -USR1 "$STEP_PID" 2>/dev/null || true; fi
}

# Importing an image takes minutes. It is done once per node and before any clock runs; the lines that follow find the
# container by its name.
make_containers() {
  local number begin
  for number in "${!IMAGES[@]}"; do
    begin=$SECONDS
    say "image: ${MAKE_IMAGES[number]}"
    eval "run_step ${MAKE_IMAGES[number]}" || { REASON="${IMAGES[number]} cannot be started" && return 5; }
    say "image: ${IMAGES[number]} ready after $((SECONDS - begin)) s"
  done
}

remove_containers() {
  local line
  for line in "${REMOVE_IMAGES[@]}"; do eval "$line" &>/dev/null || true; done
  REMOVE_IMAGES=()
}

preflight() {
  local status=0
  mkdir -p "$RUN/slurm"
  echo "$JOB-$RESTART" >"$RUN/slurm/token"
  export MASTER_PORT=$PORT
  if [[ ${SERVER_PIDS[rollout server]:-} ]]; then PREFLIGHT+=(--rollout-url "$ROLLOUT_URL"); fi
  run_step timeout "$PREFLIGHT_S" "${PREFLIGHT[@]}" > >(tee -a "$LOGS/preflight.log") 2>&1 || status=$?
  if ((status == 0)); then return; fi
  if ((status == 124)); then say "preflight: not finished within $PREFLIGHT_S s"; fi
  REASON="preflight failed"
  return 3
}

# --- the servers' groups ----------------------------------------------------------------------------------------

# start_server NAME URL SECONDS COMMAND...: in the background, until its port answers; from then on its death stops the job.
start_server() {
  local name=$1 url=$2 patience=$3 begin=$SECONDS place=${2#http://} job_shell=$$
  shift 3
  place=${place%%/*}
  say "$name: $(show "$@")"
  "$@" &
  SERVER_PIDS[$name]=$!
  until (exec 9<>"/dev/tcp/${place%:*}/${place##*:}") 2>/dev/null; do
    if ! kill -0 "${SERVER_PIDS[$name]}" 2>/dev/null || ((SECONDS - begin > patience)); then
      REASON="the $name does not answer at $url"
      return 4
    fi
    if [[ $STOP ]]; then return "$STOPPED"; fi
    sleep 0.5
  done
  say "$name: answers at $url after $((SECONDS - begin)) s"
  (while kill -0 "${SERVER_PIDS[$name]}" 2>/dev/null; do sleep 1; done && kill -USR2 "$job_shell") &
}

# Before all else, or as soon as a stage of this very job has made the model it starts with; never when AMPO is done.
start_rollout_server() {
  local number
  if ((${#ROLLOUT[@]} == 0)) || [[ ${SERVER_PIDS[rollout server]:-} || ! -f $ROLLOUT_MODEL/config.json ]]; then return 0; fi
  for number in "${!STAGES[@]}"; do
    if [[ ${STAGES[number]} == ampo && -e ${OUTPUTS[number]} ]]; then return 0; fi
  done
  start_server "rollout server" "$ROLLOUT_URL" "$ROLLOUT_START_S" "${ROLLOUT[@]}"
}

stop_if_server_died() {
  local name
  for name in "${!SERVER_PIDS[@]}"; do
    if ! kill -0 "${SERVER_PIDS[$name]}" 2>/dev/null; then stop "the $name died"; fi
  done
}

# A stage may end because its server died before this shell has heard of it.
hear_of_servers() {
  local second
  for second in 1 2 3; do
    if [[ $STOP ]] || ((${#SERVER_PIDS[@]} == 0)); then return; fi
    sleep "$((second > 1))"
    stop_if_server_died
  done
}

# --- the end ----------------------------------------------------------------------------------------------------

job_end_time() { # the trainer stops by itself when the next step would not fit
  if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    local shown
    shown=$(scontrol show job "$JOB" 2>/dev/null || true)
    if [[ $shown =~ EndTime=([0-9T:-]+) ]]; then SLURM_JOB_END_TIME=$(date -d "${BASH_REMATCH[1]}" +%s); fi
  fi
  export SLURM_JOB_END_TIME
}

being_ended() { # by Slurm, whose word for it is any state but RUNNING (COMPLETING, CANCELLED, ...)
  local shown
  shown=$(scontrol show job "$JOB" 2>/dev/null) && [[ ! $shown =~ JobState=RUNNING ]]
}

finish() { # STATUS REASON: write it down, requeue if that brings anything, exit
  local status=$1 decision
  trap '' USR1 USR2 TERM
  decision=$(helper recipes.slurm end "$RUN" --status "$status" --reason "$2")
  say "$2 (status $status): $decision"
  remove_containers
  if [[ $decision == requeue ]]; then
    # Somebody who cancelled the job does not want it back.
    if being_ended; then
      say "not requeued: the job is being ended"
    else
      scontrol requeue "$JOB"
      sleep 120 # Slurm ends this script meanwhile
    fi
  fi
  exit "$status"
}
