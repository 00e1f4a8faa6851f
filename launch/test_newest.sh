#!/usr/bin/env bash
# Runs the fast part of the tests and the golden tests with the newest versions that requirements.txt allows.
#   bash launch/test_newest.sh                     in a folder with Debian 13 and Python 3.13: .newest, or $FOLDER
#   PYTHON=python3.12 bash launch/test_newest.sh   with that Python, without Debian; needs neither root nor debootstrap
# The Debian folder is created once by debootstrap (0.3 GB; 2 GB with packages) and kept. Each time the committed state of
# this checkout is copied into it and gets its own environment, so that nothing that is installed here has an effect.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup_venv.sh
source launch/setup_venv.sh
usage_if_asked "$@"
folder=${FOLDER:-.newest}
python=${PYTHON:-}
certificates=/etc/ssl/certs/ca-certificates.crt

lacks() {
    echo "spo_jax: error: a Debian 13 folder cannot be made: $1; or set PYTHON to a Python of 3.12 or newer." >&2
    exit 2
}

# Runs a command inside the folder as on another machine: its own /proc, and none of these environment variables.
inside() {
    # shellcheck disable=SC2016  # $0 and $@ belong to the inner shell
    unshare --mount bash -c 'mount -t proc proc "$0/proc" && exec chroot "$0" /usr/bin/env -i "$@"' "$folder" \
        PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 "$@"
}

make_debian() {
    [ "$(id -u)" -eq 0 ] || lacks "only root may make one"
    command -v debootstrap >/dev/null || lacks "debootstrap is not installed (apt-get install debootstrap)"
    unshare --mount true 2>/dev/null || lacks "this machine does not let a process mount anything, not even for itself"
    if [ ! -f "$folder/made" ]; then
        rm -rf "$folder"
        debootstrap --variant=minbase --include=python3-venv,ca-certificates trixie "$folder" >"$folder.log" 2>&1 ||
            lacks "debootstrap failed ($(tail -n 1 "$folder.log"))"
        touch "$folder/made"
    fi
    cp -L /etc/resolv.conf "$folder/etc/resolv.conf"
    if [ -f "$certificates" ]; then
        cp -L "$certificates" "$folder$certificates"  # some networks need their own certificate
    fi
}

# Runs in the copy of the checkout, here or inside the folder.
read -r -d '' tests <<'END' || true
set -euo pipefail
cd "$1"
"$2" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -r requirements-fast.txt
.venv/bin/python -c '
import platform
from importlib.metadata import version
names = "jax jaxlib flax optax orbax-checkpoint chex numpy diffusers transformers huggingface_hub".split()
print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names), sep=", ")'
.venv/bin/python -m pytest -q -n 2 --dist loadfile -m fast
.venv/bin/python -m pytest -q -n 2 --dist loadfile tests/parity/test_golden.py tests/parity/test_golden_sdxl.py
END

if [ -n "$python" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    git archive HEAD | tar -x -C "$folder"
    env -u PYTHON JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 bash -c "$tests" tests "$folder" "$(command -v "$python")"
else
    make_debian
    rm -rf "$folder/root/spo_jax"
    mkdir "$folder/root/spo_jax"
    git archive HEAD | tar -x -C "$folder/root/spo_jax"
    sed -n 's/^PRETTY_NAME=//p' "$folder/etc/os-release"
    inside bash -c "$tests" tests /root/spo_jax python3
fi
