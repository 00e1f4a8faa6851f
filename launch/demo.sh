#!/usr/bin/env bash
# Installs spo_jax's requirements into .venv and runs the emoji demo; further arguments override the config.
#   bash launch/demo.sh [--config.seed=1 ...]        results in runs/demo, or in $WORKDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
setup_venv requirements.txt
exec .venv/bin/python -m spo_jax.main --config=configs/tiny.py --workdir="${WORKDIR:-runs/demo}" "$@"
