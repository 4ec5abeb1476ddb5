#!/usr/bin/env bash
#SBATCH --job-name=rollout-server
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
#
# A TensorRT-LLM rollout server (rollout.engine=trtllm_server) in NVIDIA's TensorRT-LLM container, version 1.2 or later.
#
#   slurm/rollout_server.sh [--dry-run] RUN_DIR MODEL_DIR [OPTIONS of nemo_ampo.rollout.trtllm_serve]
#
# As a job of its own:   sbatch --gpus-per-node=4 slurm/rollout_server.sh RUN_DIR MODEL_DIR
# As a het group:        slurm/ampo.sh starts it when ampo.rollout.engine=trtllm_server, and tells the trainer its URL.
#
# The URL appears in RUN_DIR/rollout.url once the engine is up; a trainer of another job needs it as
# rollout.trtllm_server.url.
# RUN_DIR and the trainer's rollout.trtllm_server.weights_dir must have the same path in both containers.
#
#   ROLLOUT_IMAGE       container image, e.g. nvcr.io/nvidia/tensorrt-llm/release:1.2.0 (empty: no container)
#   ROLLOUT_CONTAINER   pyxis (default) or apptainer
#   ROLLOUT_MOUNTS      further mounts, comma-separated
#   ROLLOUT_GPUS        GPUs of the server, default 1; 0 asks Slurm for none
#   ROLLOUT_PORT        default 8200
#   ROLLOUT_PYTHON      Python inside the container, default python3
#   ROLLOUT_HET_GROUP   index of the het group that runs it, empty outside of a het job
#   ROLLOUT_LOG         log file of the server, empty for the job's own output
set -euo pipefail

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

ROOT=${AMPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
DRY=''
if [[ ${1:-} == --dry-run ]]; then DRY=1 && shift; fi
(($# >= 2)) || fail "usage: slurm/rollout_server.sh [--dry-run] RUN_DIR MODEL_DIR [OPTIONS]"
RUN=$(realpath -m "$1") MODEL=$(realpath -m "$2")
shift 2
[[ -f $ROOT/nemo_ampo/rollout/trtllm_serve.py ]] || fail "AMPO_ROOT: no nemo_ampo in $ROOT"
[[ $DRY || -f $MODEL/config.json ]] || fail "MODEL_DIR: no config.json in $MODEL"
: "${ROLLOUT_IMAGE:=}" "${ROLLOUT_MOUNTS:=}" "${ROLLOUT_GPUS:=1}" "${ROLLOUT_PORT:=8200}" "${ROLLOUT_PYTHON:=python3}"
: "${ROLLOUT_HET_GROUP:=}" "${ROLLOUT_LOG:=}" "${ROLLOUT_CONTAINER:=pyxis}"

LINE=(srun --job-name=rollout-server)
if [[ $ROLLOUT_HET_GROUP ]]; then LINE+=("--het-group=$ROLLOUT_HET_GROUP"); fi
# One process: the engine starts its workers itself, and must not mistake Slurm's MPI variables for its own.
LINE+=(--nodes=1 --ntasks=1 --overlap --mpi=none)
if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then LINE+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi
if ((ROLLOUT_GPUS)); then LINE+=("--gpus-per-node=$ROLLOUT_GPUS"); fi
if [[ $ROLLOUT_LOG ]]; then LINE+=("--output=$ROLLOUT_LOG" --open-mode=append); fi
MOUNTS=$ROOT:$ROOT,$RUN:$RUN,$MODEL:$MODEL${ROLLOUT_MOUNTS:+,$ROLLOUT_MOUNTS} INSIDE=()
if [[ $ROLLOUT_IMAGE && $ROLLOUT_CONTAINER == apptainer ]]; then
  INSIDE=(apptainer exec --nv --bind "$MOUNTS" --pwd "$ROOT" "$ROLLOUT_IMAGE")
elif [[ $ROLLOUT_IMAGE ]]; then
  LINE+=("--container-image=$ROLLOUT_IMAGE" "--container-mounts=$MOUNTS" "--container-workdir=$ROOT")
  LINE+=(--no-container-mount-home)
fi
LINE+=("${INSIDE[@]}" env --unset=SLURM_PROCID --unset=SLURM_NTASKS --unset=PMIX_RANK --unset=PMI_RANK "PYTHONPATH=$ROOT")
LINE+=("$ROLLOUT_PYTHON" -m nemo_ampo.rollout.trtllm_serve --model "$MODEL")
LINE+=(--tensor-parallel "$((ROLLOUT_GPUS > 0 ? ROLLOUT_GPUS : 1))")
LINE+=(--port "$ROLLOUT_PORT" --url-file "$RUN/rollout.url" "$@")

if [[ $DRY ]]; then
  printf '%q' "${LINE[0]}"
  printf ' %q' "${LINE[@]:1}"
  echo
  exit 0
fi
mkdir -p "$RUN"
rm -f "$RUN/rollout.url"
trap 'rm -f "$RUN/rollout.url"' EXIT
"${LINE[@]}"
