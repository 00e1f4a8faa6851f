# Sourced by the other scripts: makes .venv and installs a requirements file, unless that is done already.
# shellcheck shell=bash

setup_venv() {
    local requirements=$1 python stamp
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        python=$(command -v python3.11 || command -v python3 || true)
    fi
    if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "spo_jax: error: Python 3.11 or newer is needed; install it or set PYTHON to it." >&2
        exit 2
    fi
    stamp=.venv/installed-$(cat requirements.txt "$requirements" | sha256sum | cut -c1-16)
    if [ ! -f "$stamp" ]; then
        # Asks for pip, not for the folder: a venv whose making was interrupted has the one without the other.
        .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp"
    fi
}
