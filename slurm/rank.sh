#!/usr/bin/env bash
# One process of a stage: Slurm's variables become the ones torchrun would set, then the command runs in its place.
set -euo pipefail

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_STEP_NUM_TASKS / SLURM_STEP_NUM_NODES)) GROUP_RANK=$SLURM_NODEID
# Lightning takes its own Slurm support, with a signal handler and other rules, unless it sees torchrun's run id.
export TORCHELASTIC_RUN_ID=$SLURM_JOB_ID
# Stages of one process, such as conversions, are bound by the processor and use all that their step has; ranks take one each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_STEP_NUM_TASKS == 1 ? ${SLURM_CPUS_PER_TASK:-1} : 1))}
exec "$@"
