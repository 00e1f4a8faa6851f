#!/usr/bin/env bash
# Trains on all GPUs of this machine with one process: installs into .venv with JAX for CUDA 12, then runs spo_jax.main.
#   bash launch/gpu.sh --config=configs/sd15.py --workdir=runs/sd15 [--config.key=value ...]
# CUDA_VISIBLE_DEVICES=0,1 selects GPUs, JAX_EXTRA=cuda13 another build of JAX, PYTHON=python3.12 another Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
setup_venv requirements.txt "${JAX_EXTRA:-cuda12}"
exec .venv/bin/python -m spo_jax.main "$@"
