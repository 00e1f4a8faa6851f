#!/usr/bin/env bash
# Measures what a GPU or TPU does, in at most six minutes: benchmarks/on_chip.py says what. Further arguments go to it.
# The machine's own JAX is used, and .venv only where it is there. Nothing is installed or fetched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python3
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; fi
export HF_HUB_OFFLINE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
exec timeout 360 "$python" -m benchmarks.on_chip "$@"
