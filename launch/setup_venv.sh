# Sourced by the other scripts: makes .venv and installs a requirements file, unless that is done already.
# shellcheck shell=bash

# An empty file of this name says that a requirements file is installed as it is now; it may include requirements.txt.
stamp_of() {
    echo ".venv/installed-$1-$(cat requirements.txt "$1" | cksum | tr ' ' '-')"
}

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
    stamp=$(stamp_of "$requirements")
    if [ ! -f "$stamp" ]; then
        # Asks for pip, not for the folder: a venv whose making was interrupted has the one without the other.
        .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
        rm -f .venv/installed-*  # what they say may not hold after this
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp" "$(stamp_of requirements.txt)"
    fi
}
