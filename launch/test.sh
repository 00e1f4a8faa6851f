#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them. Further arguments go to pytest, for example -m fast.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
setup_venv requirements-test.txt
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
# Without reordering, the files run in alphabetical order.
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
