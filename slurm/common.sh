# Shared by slurm/*.sh: settings, srun lines, the servers' groups, signals, requeue. Sourced, never run.
#
# What runs is decided by `python -m recipes.slurm` (see there); this file only starts it on the job's nodes.
# Every AMPO_* variable may come from the environment or from slurm/site.env; slurm/site.env.example explains them.
# shellcheck shell=bash

set -euo pipefail

PREFLIGHT_S=120
STOPPED=75 # a stage that was asked to stop and continues with the same command
SERVERS=()                # groups behind the trainer's
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
  : "${AMPO_GPU_KIND:=h100}" "${AMPO_NODES:=1}" "${AMPO_GPUS_PER_NODE:=0}" "${AMPO_JUDGE_GPUS:=0}" "${AMPO_SBATCH:=}" "${AMPO_JUDGE_COMMAND:=}"
  : "${AMPO_RANKS_PER_NODE:=$((AMPO_GPUS_PER_NODE > 0 ? AMPO_GPUS_PER_NODE : 1))}"
  : "${ROLLOUT_GPUS:=1}" "${AMPO_CONTAINER:=none}" "${AMPO_IMAGE:=}" "${AMPO_JUDGE_IMAGE:=}" "${AMPO_MOUNTS:=}"
  : "${AMPO_MPI:=pmix}" "${AMPO_MAX_RESTARTS:=20}" "${AMPO_MIN_FREE_GB:=}"
  if [[ -z ${AMPO_PYTHON:-} ]]; then
    AMPO_PYTHON=python
    if [[ $AMPO_CONTAINER == none && -x $ROOT/.venv/bin/python ]]; then AMPO_PYTHON=$ROOT/.venv/bin/python; fi
  fi
  case $AMPO_CONTAINER in
    none) ;;
    pyxis | apptainer) [[ $AMPO_IMAGE ]] || fail "AMPO_IMAGE: an image is required for AMPO_CONTAINER=$AMPO_CONTAINER" ;;
    *) fail "AMPO_CONTAINER: expected none, pyxis or apptainer, got '$AMPO_CONTAINER'" ;;
  esac
  if [[ $AMPO_JUDGE_IMAGE ]]; then
    [[ $AMPO_CONTAINER != none ]] || fail "AMPO_JUDGE_IMAGE: nothing starts it; set AMPO_CONTAINER to pyxis or apptainer"
    [[ $AMPO_JUDGE_COMMAND ]] || fail "AMPO_JUDGE_IMAGE: the demo judge runs in AMPO_IMAGE; set AMPO_JUDGE_COMMAND to what this image serves"
  fi
  JOB=${SLURM_HET_JOB_ID:-${SLURM_JOB_ID:-0}}
  JOB=${SLURM_JOB_ID_HET_GROUP_0:-$JOB}
  RESTART=${SLURM_RESTART_COUNT:-0}
  IMAGE=$AMPO_IMAGE CONTAINER=ampo-$JOB
  HET=${SLURM_HET_SIZE:-}
  mapfile -t NODES < <(node_names "${SLURM_JOB_NODELIST_HET_GROUP_0:-${SLURM_JOB_NODELIST:-}}" "$AMPO_NODES" node)
  RANKS=$((${#NODES[@]} * AMPO_RANKS_PER_NODE))
  # Ports differ from job to job, and from stage to stage, so that none waits for its predecessor's to be released. They end
  # below the range from which systems hand out ports of their own.
  : "${AMPO_PORT:=$((20000 + JOB * 16 % 12000))}"
  MASTER_ADDR=$(node_address "${NODES[0]}")
  export MASTER_ADDR PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
  export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
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
#   WHERE  all (nodes of the trainer), first (of them), or the number of a server's group (its first node)
#   COUNT  processes per node;  GPUS per node
#   LOG    log file of each process, or - for the job's own output
#   MPI    mpi or plain: only a stage that needs MPI gets its environment
# IMAGE is run; pyxis keeps the container under the name CONTAINER, so that the job's next line on that node starts at once.
line() {
  local name=$1 where=$2 count=$3 gpus=$4 log=$5 mpi=$6 nodes=1 group=0 alone=1 inside=()
  shift 6
  case $where in
    all) nodes=${#NODES[@]} ;;
    first) alone=$AMPO_RANKS_PER_NODE ;;
    *) group=$where ;;
  esac
  LINE=(srun "--job-name=$name")
  if [[ $HET ]]; then LINE+=("--het-group=$group"); fi
  LINE+=("--nodes=$nodes" "--ntasks=$((nodes * count))" "--ntasks-per-node=$count" --overlap --kill-on-bad-exit=1)
  # The one process of a stage that runs between those of the ranks may use the processors of them all.
  if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
    LINE+=("--cpus-per-task=$((SLURM_CPUS_PER_TASK * alone))")
  fi
  if ((gpus)); then LINE+=("--gpus-per-node=$gpus"); fi
  LINE+=("--mpi=$([[ $mpi == mpi ]] && echo "$AMPO_MPI" || echo none)")
  if [[ $log != - ]]; then LINE+=("--output=$log" --open-mode=append); fi
  case $AMPO_CONTAINER in
    pyxis)
      LINE+=("--container-image=$IMAGE" "--container-name=$CONTAINER" "--container-mounts=$ROOT:$ROOT${AMPO_MOUNTS:+,$AMPO_MOUNTS}")
      LINE+=("--container-workdir=$ROOT" --no-container-mount-home)
      ;;
    apptainer)
      inside=(apptainer exec)
      if ((gpus)); then inside+=(--nv); fi
      inside+=(--bind "$ROOT:$ROOT${AMPO_MOUNTS:+,$AMPO_MOUNTS}" --pwd "$ROOT" "$IMAGE")
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

in_judge_image() { # COMMAND...
  IMAGE=${AMPO_JUDGE_IMAGE:-$AMPO_IMAGE} CONTAINER=$CONTAINER${AMPO_JUDGE_IMAGE:+-judge} "$@"
}

judge_line() { # WHERE
  local command=("$AMPO_PYTHON" -m nemo_ampo.world.judge_server --host 0.0.0.0 --port "$JUDGE_PORT")
  # The site's command is shell text that may use $JUDGE_PORT; quoting and variables are its own.
  if [[ $AMPO_JUDGE_COMMAND ]]; then command=(bash -c "$AMPO_JUDGE_COMMAND"); fi
  export JUDGE_PORT
  in_judge_image line judge "$1" 1 "$AMPO_JUDGE_GPUS" "$LOGS/judge.log" plain "${command[@]}"
}

rollout_line() { # GROUP [--dry-run]
  local limits
  read -r -a limits <<<"$ROLLOUT_LIMITS"
  export AMPO_ROOT=$ROOT ROLLOUT_HET_GROUP=$1 ROLLOUT_PORT ROLLOUT_GPUS ROLLOUT_LOG=$LOGS/rollout-server.log
  if [[ $AMPO_CONTAINER != none ]]; then export ROLLOUT_CONTAINER=${ROLLOUT_CONTAINER:-$AMPO_CONTAINER}; fi
  LINE=("$ROOT/slurm/rollout_server.sh" "${@:2}" "$RUN" "$ROLLOUT_MODEL" "${limits[@]}")
}

preflight_line() {
  local rollout=()
  if [[ $DRY || ${SERVER_PIDS[rollout server]:-} ]]; then rollout=(${ROLLOUT_URL:+--rollout-url "$ROLLOUT_URL"}); fi
  line preflight all "$AMPO_RANKS_PER_NODE" "$AMPO_GPUS_PER_NODE" - plain "$AMPO_PYTHON" -m nemo_ampo.job.preflight \
    --shared "$RUN" --token "$JOB-$RESTART" --gpus "$AMPO_GPUS_PER_NODE" --run-gb "${AMPO_MIN_FREE_GB:-$RUN_GB}" \
    --judge-url "$JUDGE_URL" "${rollout[@]}"
}

# --- containers -------------------------------------------------------------------------------------------------

# Importing an image takes minutes. It is done once per node and before any clock runs; the lines that follow find the
# container by its name.
make_container() { # WHERE
  local begin=$SECONDS
  if [[ $AMPO_CONTAINER != pyxis ]]; then return; fi
  line image "$1" 1 0 - plain true
  if [[ $DRY ]]; then show "${LINE[@]}" && return; fi
  say "image: $(show "${LINE[@]}")"
  run_step || { REASON="$IMAGE cannot be started" && return 5; }
  say "image: $CONTAINER made in $((SECONDS - begin)) s"
}

# Pyxis does so by itself only where the site has set container_scope=job.
remove_container() { # WHERE
  if [[ $AMPO_CONTAINER != pyxis ]]; then return; fi
  AMPO_CONTAINER=none line remove "$1" 1 0 - plain enroot remove --force "pyxis_$CONTAINER"
  if [[ $DRY ]]; then show "${LINE[@]}" && return; fi
  "${LINE[@]}" &>/dev/null || true
}

each_container() { # COMMAND: runs it for the trainer's nodes, and for the judge's
  local group
  "$1" all || return
  if group=$(group_of judge); then in_judge_image "$1" "$group"; fi
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
  local group=("--ntasks-per-node=$AMPO_RANKS_PER_NODE") common=() server gpus
  read -r -a common <<<"$AMPO_SBATCH"
  if ((AMPO_GPUS_PER_NODE)); then group+=("--gpus-per-node=$AMPO_GPUS_PER_NODE"); fi
  LINE=(sbatch "${common[@]}" "--nodes=$AMPO_NODES" "${group[@]}")
  for server in "${SERVERS[@]}"; do
    LINE+=(: "${common[@]}" --nodes=1 --ntasks=1)
    gpus=$([[ $server == judge ]] && echo "$AMPO_JUDGE_GPUS" || echo "$ROLLOUT_GPUS")
    if ((gpus)); then LINE+=("--gpus-per-node=$gpus"); fi
  done
  LINE+=("$ROOT/slurm/$SCRIPT" "$RECIPE" "${OVERRIDES[@]}")
}

dry_run() {
  local fields group LINE
  submit_line
  printf '# submit\n' && show "${LINE[@]}"
  printf '\n# script: %s\n' "$ROOT/slurm/$SCRIPT" && cat "$ROOT/slurm/$SCRIPT"
  printf '\n# srun\n'
  each_container make_container
  if group=$(group_of judge); then judge_line "$group" && show "${LINE[@]}"; fi
  if group=$(group_of rollout); then rollout_line "$group" --dry-run && "${LINE[@]}"; fi
  preflight_line && show "${LINE[@]}"
  while IFS=$'\t' read -r -a fields; do
    stage_line "${fields[@]}" && show "${LINE[@]}"
  done <<<"$PLAN"
  each_container remove_container
  if ((AMPO_GPUS_PER_NODE)); then printf '\n# memory\n' && { memory "$@" || true; }; fi
  printf '\n# recipe\n'
  helper recipes.slurm show "$RECIPE" "${OVERRIDES[@]}"
}

# --- a job ------------------------------------------------------------------------------------------------------

# open_recipe SCRIPT [--dry-run] [RECIPE] [key=value...]: settings, recipe, and whether this is more than a dry run.
open_recipe() {
  local facts fact
  SCRIPT=$1 DRY='' FORCE='' RECIPE=configs/pipeline/tiny.yaml
  shift
  while [[ ${1:-} == --dry-run || ${1:-} == --force ]]; do
    if [[ $1 == --force ]]; then FORCE=1; else DRY=1; fi
    shift
  done
  cd "$ROOT"
  settings
  if [[ ${1:-} && $1 != *=* ]]; then RECIPE=$1 && shift; fi
  OVERRIDES=("$@")
  if [[ ! $DRY && ${SLURM_JOB_ID:-} ]]; then trap 'each_container remove_container' EXIT; fi
  facts=$(helper recipes.slurm get "$RECIPE" "${OVERRIDES[@]}") || exit 2
  RUN='' JUDGE_MODE='' JUDGE_URL='' JUDGE_PORT=0 JUDGE_START_S=0 RUN_GB=0
  ROLLOUT_MODEL='' ROLLOUT_PORT=0 ROLLOUT_START_S=0 ROLLOUT_LIMITS=''
  while IFS= read -r fact; do printf -v "${fact%%=*}" %s "${fact#*=}"; done <<<"$facts"
  if ((JUDGE_PORT == 0)); then JUDGE_PORT=$((AMPO_PORT + 15)); fi
  if ((ROLLOUT_PORT == 0)); then ROLLOUT_PORT=$((AMPO_PORT + 14)); fi
  ROLLOUT_URL=''
  RUN=$(realpath -m "$RUN")
  LOGS=$RUN/logs/$JOB-$RESTART
}

# What each training stage fills of a GPU; status 2 when one does not fit. The same as `nemo-ampo plan`.
memory() {
  ((AMPO_GPUS_PER_NODE)) || return 0
  helper recipes.slurm memory "$RECIPE" "${OVERRIDES[@]}" --ranks "$((AMPO_NODES * AMPO_RANKS_PER_NODE))" \
    --gpu "$AMPO_GPU_KIND" --only "$@"
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
  # The parts of the pipeline that are run alone do not draw.
  if ((${#only[@]})); then ROLLOUT_MODEL=''; fi
  if [[ $JUDGE_MODE == hetjob ]]; then SERVERS+=(judge); fi
  if [[ $ROLLOUT_MODEL ]]; then SERVERS+=(rollout); fi
  if [[ ! $DRY && ! ${SLURM_JOB_ID:-} ]]; then memory "${only[@]}" >&2 || [[ $FORCE ]] || exit 2; fi
  submit_unless_inside
  find_servers
  if [[ $DRY ]]; then record=--no-record; fi
  PLAN=$(helper recipes.slurm plan "$RECIPE" "${OVERRIDES[@]}" "$record" --ranks "$RANKS" --judge-url "$JUDGE_URL" \
    --rollout-url "$ROLLOUT_URL" --only "${only[@]}") || exit 2
  if [[ $DRY ]]; then dry_run "${only[@]}"; else attempt; fi
}

# run_judge [--dry-run] [RECIPE] [key=value...]: a judge in a job of its own.
run_judge() {
  AMPO_RANKS_PER_NODE=1 AMPO_GPUS_PER_NODE=${AMPO_JUDGE_GPUS:-0}
  open_recipe judge.sh "$@"
  submit_unless_inside
  JUDGE_URL=http://$MASTER_ADDR:$JUDGE_PORT/v1
  judge_line first
  if [[ $DRY ]]; then
    show "${LINE[@]}"
    return
  fi
  mkdir -p "$LOGS"
  trap 'rm -f "$RUN/judge.url"; remove_container first; in_judge_image remove_container first' EXIT
  echo "$JUDGE_URL" >"$RUN/judge.url"
  say "judge: $(show "${LINE[@]}")"
  "${LINE[@]}"
}

# The number of the group that runs a server of SERVERS; status 1 when none does.
group_of() { # SERVER
  local index
  for index in "${!SERVERS[@]}"; do
    if [[ ${SERVERS[index]} == "$1" ]]; then echo $((index + 1)) && return; fi
  done
  return 1
}

find_servers() { # JUDGE_URL and ROLLOUT_URL from the nodes of their groups
  local server names
  if ((${#SERVERS[@]} == 0)); then return; fi
  if [[ $DRY && ! ${SLURM_JOB_ID:-} ]]; then HET=$((${#SERVERS[@]} + 1)); fi
  ((${HET:-1} > ${#SERVERS[@]})) || fail "this job has no group for each of: ${SERVERS[*]}; submit with slurm/$SCRIPT, or sbatch OPTIONS : OPTIONS slurm/$SCRIPT"
  for server in "${SERVERS[@]}"; do
    names=SLURM_JOB_NODELIST_HET_GROUP_$(group_of "$server")
    names=$(node_names "${!names:-}" 1 "$server" | head -n 1)
    case $server in
      judge) JUDGE_URL=http://$(node_address "$names"):$JUDGE_PORT/v1 ;;
      rollout) ROLLOUT_URL=http://$(node_address "$names"):$ROLLOUT_PORT ;;
    esac
  done
}

attempt() {
  local status=0
  STOP='' STEP_PID=''
  trap 'stop "asked to stop before the time limit"' USR1
  trap 'stop "asked to end"' TERM
  trap stop_if_server_died USR2
  helper recipes.slurm begin "$RUN" --job "$JOB" --restart "$RESTART" --max-restarts "$AMPO_MAX_RESTARTS" || exit 2
  mkdir -p "$LOGS"
  job_end_time
  say "job $JOB, attempt $RESTART, ${#NODES[@]} nodes (${NODES[*]}), $RANKS ranks, logs in $LOGS"
  REASON=''
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

stages() {
  local fields number=0
  each_container make_container || return
  start_judge || return
  start_rollout_server || return
  preflight || return
  while IFS=$'\t' read -r -a fields <&3; do
    number=$((number + 1))
    if [[ -e ${fields[3]} ]]; then
      say "${fields[0]}: done before (${fields[3]})"
      continue
    fi
    if [[ $STOP ]]; then return "$STOPPED"; fi
    start_rollout_server || return
    export MASTER_PORT=$((AMPO_PORT + number % 13 + 1))
    stage_line "${fields[@]}"
    say "${fields[0]}: $(show "${LINE[@]}")"
    run_step || { local status=$? && REASON="${fields[0]} failed" && hear_of_servers; return "$status"; }
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

# --- the servers' groups ----------------------------------------------------------------------------------------

# start_server NAME URL SECONDS: LINE in the background, until its port answers; from then on its death stops the job.
start_server() {
  local name=$1 url=$2 patience=$3 begin=$SECONDS place=${2#http://} job_shell=$$
  place=${place%%/*}
  say "$name: $(show "${LINE[@]}")"
  "${LINE[@]}" &
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

start_judge() {
  local group
  group=$(group_of judge) || return 0
  judge_line "$group"
  start_server judge "$JUDGE_URL" "$JUDGE_START_S"
}

# Before all else, or as soon as a stage of this very job has made the model it starts with; never when AMPO is done.
start_rollout_server() {
  local group
  group=$(group_of rollout) || return 0
  if [[ ${SERVER_PIDS[rollout server]:-} || ! -f $ROLLOUT_MODEL/config.json ]] || is_done ampo; then return 0; fi
  rollout_line "$group"
  start_server "rollout server" "$ROLLOUT_URL" "$ROLLOUT_START_S"
}

is_done() { # STAGE
  local fields
  while IFS=$'\t' read -r -a fields; do
    if [[ ${fields[0]} == "$1" && -e ${fields[3]} ]]; then return 0; fi
  done <<<"$PLAN"
  return 1
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
  decision=$(helper recipes.slurm end "$RUN" --status "$status" --reason "$2" --max-restarts "$AMPO_MAX_RESTARTS")
  say "$2 (status $status): $decision"
  each_container remove_container
  trap - EXIT
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
