#!/usr/bin/env bash
# Trains on all chips of this TPU VM: installs JAX for TPUs, then runs spo_jax.main. A whole slice: launch/tpu_pod.sh.
#   bash launch/tpu_vm.sh --config=configs/sd15.py --workdir=runs/sd15 [--config.key=value ...]
# One host of a slice does not start alone: it waits for the others and says which are missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
setup_venv requirements.txt tpu
exec .venv/bin/python -m spo_jax.main "$@"
