#!/usr/bin/env bash
# Makes .venv and installs a requirements file, unless that is done already. Sourced by the other scripts, or run:
#   bash launch/setup_venv.sh requirements.txt [cuda12 | tpu]

# The script's own header, for -h and --help as the first argument.
usage_if_asked() {
    case ${1:-} in
    -h | --help)
        sed -n '2,${/^#SBATCH/d;/^#/!q;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    esac
}

# An empty file of this name says that a requirements file is installed as it is now; they include each other.
stamp_of() {
    echo ".venv/installed-$1-$(cat requirements*.txt | cksum | tr ' ' '-')"
}

# setup_venv REQUIREMENTS [EXTRA]: the extra is of jax, which without one is for the CPU alone: cuda12, tpu.
setup_venv() {
    local requirements=$1 extra=${2:-} python stamp
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
    if [ -n "$extra" ] && [ ! -f "$stamp-$extra" ]; then
        # requirements.txt once more, so that the version that it allows holds.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt "jax[$extra]"
        touch "$stamp-$extra"
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    cd "$(dirname "$0")/.."
    usage_if_asked "$@"
    setup_venv "${@:-requirements.txt}"
fi
