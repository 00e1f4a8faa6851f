#!/usr/bin/env bash
# Rehearses a run of several processes on this machine's CPU. Every line of output starts with its process's number.
#   bash launch/local_processes.sh 4 --config=configs/tiny.py --workdir=runs/four [--config.key=value ...]
# When one fails, or this script gets SIGTERM, the others get SIGTERM, and SIGKILL after GRACE (30) seconds. The exit
# code is that of the first process that failed.
# PORT (8482) is the port of process 0, DEVICES (1) the simulated devices of a process. Needs .venv (launch/demo.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
count=${1:-}
if ! [[ $count =~ ^[1-9][0-9]*$ ]]; then
    echo "spo_jax: error: the number of processes comes first, for example: bash launch/local_processes.sh 2 --config=..." >&2
    exit 2
fi
shift
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-1}" PYTHONUNBUFFERED=1
python=${SPO_PYTHON:-.venv/bin/python}
pids=()

for ((i = 0; i < count; i++)); do
    # With a pipe, $! would be sed. With process substitution it is the process itself; sed ends when its output does.
    "$python" -m spo_jax.main --num_processes="$count" --process_id="$i" \
        --coordinator_address="127.0.0.1:${PORT:-8482}" "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
done
told=""
trap 'told=yes' TERM INT
code=0
deadline=""
while [ ${#pids[@]} -gt 0 ]; do
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
            code=$status
            told=yes
        fi
    done
    pids=("${running[@]}")
    if [ -n "$told" ] && [ -z "$deadline" ]; then
        deadline=$((SECONDS + ${GRACE:-30}))
        kill -TERM "${pids[@]}" 2>/dev/null || true
    elif [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    sleep 0.1
done
exit "$code"
