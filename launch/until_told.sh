#!/usr/bin/env bash
# Runs a command; exits with 75 if it was told to stop. A run that gets SIGTERM writes a checkpoint and exits with 0, as
# a finished run does, so the code 75 tells a scheduler to start it again. slurm.sh sources it, gke_jobset.yaml runs it.
#   bash launch/until_told.sh python -m spo_jax.main --config=... --workdir=...
until_told() {
    local told="" code child
    trap 'told=yes' TERM
    "$@" &
    child=$!
    while true; do
        if [ -n "$told" ]; then
            kill -TERM "$child" 2>/dev/null || true
        fi
        code=0
        wait "$child" || code=$?
        # A signal interrupts wait, not the command: pass it on and wait again.
        kill -0 "$child" 2>/dev/null || break
    done
    trap - TERM
    if [ -n "$told" ]; then
        return 75
    fi
    return "$code"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    until_told "$@"
fi
