#!/usr/bin/env bash
#SBATCH --job-name=bc
#SBATCH --nodes=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
#
# The first half of slurm/ampo.sh: convert and clone (BC). Same arguments, same run folder.
set -euo pipefail

ROOT=${AMPO_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
[[ -f $ROOT/slurm/common.sh ]] || { echo "error: no slurm/common.sh in $ROOT; submit from the project's folder or set AMPO_ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
run_job bc.sh "$@"
