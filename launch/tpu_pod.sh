#!/usr/bin/env bash
# Trains on a TPU pod slice with gcloud, one process a host. One action at a time:
#   bash launch/tpu_pod.sh create                      creates the slice (ACCELERATOR, VERSION; SPOT=1: preemptible)
#   bash launch/tpu_pod.sh copy                        copies the committed state of this checkout to every host
#   bash launch/tpu_pod.sh run --config=... --workdir=/mnt/shared/run [--config.key=value ...]
#   bash launch/tpu_pod.sh stop                        sends SIGTERM to the run on every host
#   bash launch/tpu_pod.sh delete                      deletes the slice
# Environment variables: TPU (the slice's name) and ZONE are required; PROJECT, ACCELERATOR (v5litepod-16) and VERSION
# (v2-alpha-tpuv5-lite) are optional. --workdir must be a folder that every host sees, such as a bucket: docs/pods.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
action=${1:-}
if [ -z "$action" ]; then
    echo "spo_jax: error: an action is missing: create, copy, run, stop or delete (--help)." >&2
    exit 2
fi
shift
for name in TPU ZONE; do
    if [ -z "${!name:-}" ]; then
        echo "spo_jax: error: $name is not set; for example TPU=spo ZONE=us-west4-a bash launch/tpu_pod.sh $action." >&2
        exit 2
    fi
done
place=("--zone=$ZONE")
if [ -n "${PROJECT:-}" ]; then
    place+=("--project=$PROJECT")
fi

on_all() {
    gcloud compute tpus tpu-vm ssh "$TPU" "${place[@]}" --worker=all --command="$1"
}

case $action in
create)
    kind=()
    if [ -n "${SPOT:-}" ]; then
        kind=(--spot)
    fi
    gcloud compute tpus tpu-vm create "$TPU" "${place[@]}" "${kind[@]}" \
        --accelerator-type="${ACCELERATOR:-v5litepod-16}" --version="${VERSION:-v2-alpha-tpuv5-lite}" "$@"
    ;;
copy)
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    git archive --format=tar.gz --output="$archive/spo_jax.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$archive/spo_jax.tar.gz" "$TPU:" "${place[@]}" --worker=all
    on_all "mkdir -p spo_jax && tar -xzf spo_jax.tar.gz -C spo_jax"
    ;;
run)
    # The remote side is a shell too, so every argument is quoted for it.
    on_all "cd spo_jax && bash launch/tpu_vm.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
    ;;
stop)
    # The bracket keeps pkill from matching its own shell.
    on_all "pkill -TERM -f '[s]po_jax.main' || true"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$TPU" "${place[@]}" --quiet
    ;;
*)
    echo "spo_jax: error: $action is no action; use create, copy, run, stop or delete (--help)." >&2
    exit 2
    ;;
esac
