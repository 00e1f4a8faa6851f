#!/usr/bin/env bash
#SBATCH --job-name=spo_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%A_%a.out
#SBATCH --signal=B:TERM@180
# Trains on one or several nodes of a SLURM cluster, with one process a node or one a GPU. Options of sbatch come first.
#   bash launch/setup_venv.sh requirements.txt cuda12           once, where there is a network: creates .venv
#   sbatch --nodes=2 launch/slurm.sh --config=configs/sdxl.py --workdir=/shared/run
#   sbatch --nodes=2 --ntasks-per-node=8 launch/slurm.sh ...         one process a GPU
#   sbatch --array=0-3 launch/slurm.sh --config=configs/sd15.py --workdir=/shared/run
#                                    four runs: --config.seed=I and the folder /shared/run/I for I from 0 to 3
# 180 seconds before its time is over, the run gets SIGTERM, writes a checkpoint and is queued again. SLURM itself queues
# a preempted run again. Run sbatch in this folder; SPO_PYTHON names another Python than .venv/bin/python.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
# shellcheck source=launch/until_told.sh
source launch/until_told.sh
usage_if_asked "$@"
python=${SPO_PYTHON:-.venv/bin/python}
if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "spo_jax: error: this is a script for sbatch; use launch/gpu.sh without SLURM." >&2
    exit 2
fi
arguments=("$@")
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    for i in "${!arguments[@]}"; do
        case ${arguments[i]} in
        --workdir=*) arguments[i]=${arguments[i]}/$SLURM_ARRAY_TASK_ID ;;
        esac
    done
    arguments+=("--config.seed=$SLURM_ARRAY_TASK_ID")
fi

code=0
until_told srun --kill-on-bad-exit=1 "$python" -m spo_jax.main "${arguments[@]}" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
