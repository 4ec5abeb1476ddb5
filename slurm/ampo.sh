#!/usr/bin/env bash
#SBATCH --job-name=ampo
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#
# The whole pipeline: convert, clone (BC), train (AMPO), export, evaluate; finished stages are skipped.
#
#   slurm/ampo.sh [--dry-run] [--force] [RECIPE] [key=value...]  submits itself with the options of slurm/site.env; --force
#                                                           also what does not fit its GPUs
#   sbatch [OPTIONS] slurm/ampo.sh [RECIPE] [key=value...]  the same with options of your own
#
# RECIPE is a file like those of configs/pipeline (default: tiny.yaml there). docs/slurm.md explains all of it.
set -euo pipefail

ROOT=${AMPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
[[ -f $ROOT/slurm/common.sh ]] || { echo "error: no slurm/common.sh in $ROOT; submit from the project's folder or set AMPO_ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
run_job ampo.sh "$@"
