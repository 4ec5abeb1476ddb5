# Shared by slurm/*.sh: settings, srun lines, the judge's group, signals, requeue. Sourced, never run.
#
# What runs is decided by `python -m recipes.slurm` (see there); this file only starts it on the job's nodes.
# Every AMPO_* variable may come from the environment or from slurm/site.env; slurm/site.env.example explains them.
# shellcheck shell=bash

set -euo pipefail

PREFLIGHT_S=120
STOPPED=75 # a stage that was asked to stop and continues with the same command

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
  : "${AMPO_NODES:=1}" "${AMPO_GPUS_PER_NODE:=0}" "${AMPO_JUDGE_GPUS:=0}" "${AMPO_SBATCH:=}" "${AMPO_JUDGE_COMMAND:=}"
  : "${AMPO_RANKS_PER_NODE:=$((AMPO_GPUS_PER_NODE > 0 ? AMPO_GPUS_PER_NODE : 1))}"
  : "${AMPO_CONTAINER:=none}" "${AMPO_IMAGE:=}" "${AMPO_MOUNTS:=}" "${AMPO_MPI:=pmix}"
  : "${AMPO_MAX_RESTARTS:=20}" "${AMPO_MIN_FREE_GB:=10}"
  if [[ -z ${AMPO_PYTHON:-} ]]; then
    AMPO_PYTHON=python
    if [[ $AMPO_CONTAINER == none && -x $ROOT/.venv/bin/python ]]; then AMPO_PYTHON=$ROOT/.venv/bin/python; fi
  fi
  case $AMPO_CONTAINER in
    none) ;;
    pyxis | apptainer) [[ $AMPO_IMAGE ]] || fail "AMPO_IMAGE: an image is required for AMPO_CONTAINER=$AMPO_CONTAINER" ;;
    *) fail "AMPO_CONTAINER: expected none, pyxis or apptainer, got '$AMPO_CONTAINER'" ;;
  esac
  JOB=${SLURM_HET_JOB_ID:-${SLURM_JOB_ID:-0}}
  JOB=${SLURM_JOB_ID_HET_GROUP_0:-$JOB}
  RESTART=${SLURM_RESTART_COUNT:-0}
  HET=${SLURM_HET_SIZE:-}
  mapfile -t NODES < <(node_names "${SLURM_JOB_NODELIST_HET_GROUP_0:-${SLURM_JOB_NODELIST:-}}" "$AMPO_NODES" node)
  JUDGE_NODE=$(node_names "${SLURM_JOB_NODELIST_HET_GROUP_1:-}" 1 judge | head -n 1)
  RANKS=$((${#NODES[@]} * AMPO_RANKS_PER_NODE))
  # Ports differ from job to job, and from stage to stage, so that none waits for its predecessor's to be released. They end
  # below the range from which systems hand out ports of their own.
  : "${AMPO_PORT:=$((20000 + JOB * 16 % 12000))}"
  MASTER_ADDR=$(node_address "${NODES[0]}")
  export MASTER_ADDR PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
}

node_names() { # of a Slurm node list; outside of a job so many made-up ones
  if [[ $1 ]]; then scontrol show hostnames "$1"; else seq -f "$3%g" 1 "$2"; fi
}

# Several slurmd may share a host, so a node's name need not resolve; its address does.
node_address() {
  local shown=
  if [[ ${SLURM_JOB_ID:-} ]]; then shown=$(scontrol show node "$1" 2>/dev/null || true); fi
  if [[ $shown =~ NodeAddr=([^[:space:]]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo "$1"; fi
}

# --- srun lines -------------------------------------------------------------------------------------------------

# line NAME WHERE COUNT GPUS LOG MPI COMMAND...: fills LINE.
#   WHERE  all (nodes of the trainer), first (of them), judge (first node of the second group)
#   COUNT  processes per node;  GPUS per node
#   LOG    log file of each process, or - for the job's own output
#   MPI    mpi or plain: only a stage that needs MPI gets its environment
line() {
  local name=$1 where=$2 count=$3 gpus=$4 log=$5 mpi=$6 nodes=1 inside=()
  shift 6
  if [[ $where == all ]]; then nodes=${#NODES[@]}; fi
  LINE=(srun "--job-name=$name")
  if [[ $HET ]]; then LINE+=("--het-group=$([[ $where == judge ]] && echo 1 || echo 0)"); fi
  LINE+=("--nodes=$nodes" "--ntasks=$((nodes * count))" "--ntasks-per-node=$count" --overlap --kill-on-bad-exit=1)
  if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then LINE+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
  if ((gpus)); then LINE+=("--gpus-per-node=$gpus"); fi
  LINE+=("--mpi=$([[ $mpi == mpi ]] && echo "$AMPO_MPI" || echo none)")
  if [[ $log != - ]]; then LINE+=("--output=$log" --open-mode=append); fi
  case $AMPO_CONTAINER in
    pyxis)
      LINE+=("--container-image=$AMPO_IMAGE" "--container-mounts=$ROOT:$ROOT${AMPO_MOUNTS:+,$AMPO_MOUNTS}")
      LINE+=("--container-workdir=$ROOT" --no-container-mount-home)
      ;;
    apptainer)
      inside=(apptainer exec)
      if ((gpus)); then inside+=(--nv); fi
      inside+=(--bind "$ROOT:$ROOT${AMPO_MOUNTS:+,$AMPO_MOUNTS}" --pwd "$ROOT" "$AMPO_IMAGE")
      ;;
  esac
  LINE+=("$ROOT/slurm/rank.sh" "${inside[@]}" "$@")
}

stage_line() { # FIELD...: a line of `recipes.slurm plan`
  local name=$1 width=$2 mpi=$3
  shift 4
  if [[ $width == all ]]; then
    line "$name" all "$AMPO_RANKS_PER_NODE" "$AMPO_GPUS_PER_NODE" "$LOGS/$name-rank%t.log" "$mpi" "$AMPO_PYTHON" -m "$@"
  else
    line "$name" first 1 "$((AMPO_GPUS_PER_NODE > 0))" "$LOGS/$name.log" "$mpi" "$AMPO_PYTHON" -m "$@"
  fi
}

judge_line() {
  local command=("$AMPO_PYTHON" -m nemo_ampo.demo_judge --host 0.0.0.0 --port "$JUDGE_PORT")
  # The site's command is shell text that may use $JUDGE_PORT; quoting and variables are its own.
  if [[ $AMPO_JUDGE_COMMAND ]]; then command=(bash -c "$AMPO_JUDGE_COMMAND"); fi
  export JUDGE_PORT
  line judge "$1" 1 "$AMPO_JUDGE_GPUS" "$LOGS/judge.log" plain "${command[@]}"
}

preflight_line() {
  line preflight all "$AMPO_RANKS_PER_NODE" "$AMPO_GPUS_PER_NODE" - plain "$AMPO_PYTHON" -m nemo_ampo.job.preflight \
    --shared "$RUN" --token "$JOB-$RESTART" --gpus "$AMPO_GPUS_PER_NODE" --min-free-gb "$AMPO_MIN_FREE_GB" \
    --judge-url "${JUDGE_URL#-}"
}

# Python that only reads and writes the run folder: here, or in the container on the job's first node.
helper() {
  local LINE
  if [[ ${AMPO_PLAN_PYTHON:-} || $AMPO_CONTAINER == none ]]; then
    "${AMPO_PLAN_PYTHON:-$AMPO_PYTHON}" -m "$@"
  elif [[ ${SLURM_JOB_ID:-} ]]; then
    line helper first 1 0 - plain "$AMPO_PYTHON" -m "$@"
    "${LINE[@]}"
  else
    fail "AMPO_PLAN_PYTHON: outside of a job a Python with this project's light packages is needed (see docs/slurm.md)"
  fi
}

# --- submitting and showing -------------------------------------------------------------------------------------

submit_line() { # fills LINE with the sbatch command
  local group=("--ntasks-per-node=$AMPO_RANKS_PER_NODE") common=()
  read -r -a common <<<"$AMPO_SBATCH"
  if ((AMPO_GPUS_PER_NODE)); then group+=("--gpus-per-node=$AMPO_GPUS_PER_NODE"); fi
  LINE=(sbatch "${common[@]}" "--nodes=$AMPO_NODES" "${group[@]}")
  if [[ $JUDGE_MODE == hetjob ]]; then
    LINE+=(: "${common[@]}" --nodes=1 --ntasks=1)
    if ((AMPO_JUDGE_GPUS)); then LINE+=("--gpus-per-node=$AMPO_JUDGE_GPUS"); fi
  fi
  LINE+=("$ROOT/slurm/$SCRIPT" "$RECIPE" "${OVERRIDES[@]}")
}

dry_run() {
  local fields LINE
  submit_line
  printf '# submit\n' && show "${LINE[@]}"
  printf '\n# script: %s\n' "$ROOT/slurm/$SCRIPT" && cat "$ROOT/slurm/$SCRIPT"
  printf '\n# srun\n'
  if [[ $JUDGE_MODE == hetjob ]]; then judge_line judge && show "${LINE[@]}"; fi
  preflight_line && show "${LINE[@]}"
  while IFS=$'\t' read -r -a fields; do
    stage_line "${fields[@]}" && show "${LINE[@]}"
  done <<<"$PLAN"
  printf '\n# recipe\n'
  helper recipes.slurm show "$RECIPE" "${OVERRIDES[@]}"
}

# --- a job ------------------------------------------------------------------------------------------------------

# open_recipe SCRIPT [--dry-run] [RECIPE] [key=value...]: settings, recipe, and whether this is more than a dry run.
open_recipe() {
  local facts
  SCRIPT=$1 DRY='' RECIPE=configs/pipeline/tiny.yaml
  shift
  if [[ ${1:-} == --dry-run ]]; then DRY=1 && shift; fi
  cd "$ROOT"
  settings
  if [[ ${1:-} && $1 != *=* ]]; then RECIPE=$1 && shift; fi
  OVERRIDES=("$@")
  facts=$(helper recipes.slurm get "$RECIPE" "${OVERRIDES[@]}") || exit 2
  { read -r RUN && read -r JUDGE_MODE && read -r JUDGE_URL && read -r JUDGE_PORT && read -r JUDGE_START_S; } <<<"$facts"
  if ((JUDGE_PORT == 0)); then JUDGE_PORT=$((AMPO_PORT + 15)); fi
  RUN=$(realpath -m "$RUN")
  LOGS=$RUN/logs/$JOB-$RESTART
}

submit_unless_inside() { # not in a job and not asked to show: become sbatch
  if [[ ! $DRY && ! ${SLURM_JOB_ID:-} ]]; then
    submit_line
    export AMPO_ROOT=$ROOT
    exec "${LINE[@]}"
  fi
}

# run_job SCRIPT "STAGE..." [--dry-run] [RECIPE] [key=value...]; an empty list of stages means all of them.
run_job() {
  local only record=--record
  read -r -a only <<<"$2"
  open_recipe "$1" "${@:3}"
  submit_unless_inside
  find_judge
  if [[ $DRY ]]; then record=--no-record; fi
  PLAN=$(helper recipes.slurm plan "$RECIPE" "${OVERRIDES[@]}" "$record" --ranks "$RANKS" --judge-url "$JUDGE_URL" \
    --only "${only[@]}") || exit 2
  if [[ $DRY ]]; then dry_run; else attempt; fi
}

# run_judge [--dry-run] [RECIPE] [key=value...]: a judge in a job of its own.
run_judge() {
  AMPO_RANKS_PER_NODE=1 AMPO_GPUS_PER_NODE=${AMPO_JUDGE_GPUS:-0}
  open_recipe judge.sh "$@"
  JUDGE_MODE=alone
  submit_unless_inside
  JUDGE_URL=http://$MASTER_ADDR:$JUDGE_PORT/v1
  judge_line first
  if [[ $DRY ]]; then
    show "${LINE[@]}"
    return
  fi
  mkdir -p "$LOGS"
  trap 'rm -f "$RUN/judge.url"' EXIT
  echo "$JUDGE_URL" >"$RUN/judge.url"
  say "judge: $(show "${LINE[@]}")"
  "${LINE[@]}"
}

find_judge() {
  if [[ $JUDGE_MODE == hetjob ]]; then
    if [[ $DRY && ! ${SLURM_JOB_ID:-} ]]; then HET=2; fi
    [[ $HET ]] || fail "judge.mode=hetjob: this job has no second group; submit with slurm/$SCRIPT, or sbatch OPTIONS : OPTIONS slurm/$SCRIPT"
    JUDGE_URL=http://$(node_address "$JUDGE_NODE"):$JUDGE_PORT/v1
  fi
}

attempt() {
  local status=0
  STOP='' STEP_PID=''
  trap 'stop "asked to stop before the time limit"' USR1
  trap 'stop "asked to end"' TERM
  trap 'stop "the judge died"' USR2
  helper recipes.slurm begin "$RUN" --job "$JOB" --restart "$RESTART" --max-restarts "$AMPO_MAX_RESTARTS" || exit 2
  mkdir -p "$LOGS"
  job_end_time
  say "job $JOB, attempt $RESTART, ${#NODES[@]} nodes (${NODES[*]}), $RANKS ranks, logs in $LOGS"
  REASON=''
  stages || status=$?
  if [[ $STOP ]]; then
    REASON=$STOP
    # Whatever a stage made of the request: it did not finish.
    if ((status == 0)); then status=$STOPPED; fi
  elif ((status == STOPPED)); then
    REASON="stopped at a checkpoint before the time limit"
  fi
  finish "$status" "${REASON:-finished}"
}

stages() {
  local fields number=0
  if [[ $JUDGE_MODE == hetjob ]]; then start_judge || return; fi
  preflight || return
  while IFS=$'\t' read -r -a fields <&3; do
    number=$((number + 1))
    if [[ -e ${fields[3]} ]]; then
      say "${fields[0]}: done before (${fields[3]})"
      continue
    fi
    if [[ $STOP ]]; then return "$STOPPED"; fi
    export MASTER_PORT=$((AMPO_PORT + number % 14 + 1))
    stage_line "${fields[@]}"
    say "${fields[0]}: $(show "${LINE[@]}")"
    run_step || { local status=$? && REASON="${fields[0]} failed" && return "$status"; }
    [[ -e ${fields[3]} ]] || { REASON="${fields[0]} left no ${fields[3]}" && return 1; }
    say "${fields[0]}: done"
  done 3<<<"$PLAN"
}

# Run LINE in the background, so that signals are handled while it runs; its exit status.
run_step() {
  "${LINE[@]}" &
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

preflight() {
  local status=0
  mkdir -p "$RUN/slurm"
  echo "$JOB-$RESTART" >"$RUN/slurm/token"
  export MASTER_PORT=$AMPO_PORT
  preflight_line
  LINE=(timeout "$PREFLIGHT_S" "${LINE[@]}")
  run_step > >(tee -a "$LOGS/preflight.log") 2>&1 || status=$?
  if ((status == 0)); then return; fi
  if ((status == 124)); then say "preflight: not finished within $PREFLIGHT_S s"; fi
  REASON="preflight failed"
  return 3
}

# --- the judge's group ------------------------------------------------------------------------------------------

start_judge() {
  local begin=$SECONDS host=${JUDGE_URL#http://}
  host=${host%%:*}
  judge_line judge
  say "judge: $(show "${LINE[@]}")"
  "${LINE[@]}" &
  JUDGE_PID=$!
  until (exec 9<>"/dev/tcp/$host/$JUDGE_PORT") 2>/dev/null; do
    if ! kill -0 "$JUDGE_PID" 2>/dev/null || ((SECONDS - begin > JUDGE_START_S)); then
      REASON="the judge does not answer at $JUDGE_URL"
      return 4
    fi
    if [[ $STOP ]]; then return "$STOPPED"; fi
    sleep 0.5
  done
  say "judge: answers at $JUDGE_URL after $((SECONDS - begin)) s"
  local job_shell=$$
  (while kill -0 "$JUDGE_PID" 2>/dev/null; do sleep 1; done && kill -USR2 "$job_shell") &
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

finish() { # STATUS REASON: write it down, requeue if that brings anything, exit
  local status=$1 decision state=
  trap '' USR1 USR2 TERM
  decision=$(helper recipes.slurm end "$RUN" --status "$status" --reason "$2" --max-restarts "$AMPO_MAX_RESTARTS")
  say "$2 (status $status): $decision"
  if [[ $decision == requeue ]]; then
    state=$(scontrol show job "$JOB" 2>/dev/null || true)
    # Somebody who cancelled the job does not want it back; Slurm is ending it then (COMPLETING).
    if [[ ! $state =~ JobState=RUNNING ]]; then
      say "not requeued: the job is being ended"
    else
      scontrol requeue "$JOB"
      sleep 120 # Slurm ends this script meanwhile
    fi
  fi
  exit "$status"
}
