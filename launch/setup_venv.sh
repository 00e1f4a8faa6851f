#!/usr/bin/env bash
# Creates .venv and installs a requirements file, unless that is done already. The other scripts source it; or run it:
#   bash launch/setup_venv.sh requirements.txt [cuda12 | tpu]

# Prints the script's header if the first argument is -h or --help.
usage_if_asked() {
    case ${1:-} in
    -h | --help)
        sed -n '2,${/^#SBATCH/d;/^#/!q;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    esac
}

# The empty file that marks a requirements file as installed. Its name has the checksum of all of them, because they
# include each other.
stamp_of() {
    echo ".venv/installed-$1-$(cat requirements*.txt | cksum | tr ' ' '-')"
}

# setup_venv REQUIREMENTS [EXTRA]: EXTRA is the accelerator of jax, cuda12 or tpu; without it jax runs on the CPU only.
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
        # Asks for pip, not for the folder: an interrupted venv leaves a folder without pip.
        .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
        rm -f .venv/installed-*  # an interrupted installation must not leave a mark
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        touch "$stamp" "$(stamp_of requirements.txt)"
    fi
    if [ -n "$extra" ] && [ ! -f "$stamp-$extra" ]; then
        # Together with requirements.txt, so that its bounds on the version of jax hold.
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
