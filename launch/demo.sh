#!/usr/bin/env bash
# Installs what spo_jax needs into .venv and runs the emoji demo. Further arguments override the config.
#   bash launch/demo.sh [--config.seed=1 ...]        results go to runs/demo, or to $WORKDIR
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
setup_venv requirements.txt
exec .venv/bin/python -m spo_jax.main --config=configs/tiny.py --workdir="${WORKDIR:-runs/demo}" "$@"
