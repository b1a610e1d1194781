#!/bin/sh
# Install the course into a virtual environment:  sh tools/install.sh FOLDER
# PYTHON names the Python to use; TORCH=cpu takes PyTorch without CUDA. Each failure says what to do.
set -eu
venv=$1

fail() {
    printf 'Cannot install the course: %s\n' "$1" >&2
    exit 1
}

case "$(uname -sm)" in
MINGW* | MSYS* | CYGWIN*) fail "on Windows, follow 'Without make' in README.md." ;;
Darwin*x86_64) fail "PyTorch has no packages for Macs with Intel processors any more." ;;
esac

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

python=${PYTHON:-}
if [ -n "$python" ]; then
    is_supported "$python" || fail "PYTHON=$python is not a Python 3.11, 3.12 or 3.13."
else
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if is_supported "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.11, 3.12 or 3.13 found.
Install one (from python.org, your package manager, pyenv or conda), or name it: make lab PYTHON=/path/to/python3.12"
fi

# PyTorch with CUDA unpacks to some 7 GB, without to 1 GB
if [ "${TORCH:-}" = cpu ]; then needed=2; else needed=8; fi
free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1000000) }')
if [ "$free" -lt "$needed" ] && [ ! -e "$venv/.installed" ]; then
    fail "it needs about $needed GB of free disk space here, and there are $free GB.
Free some space, or install PyTorch without CUDA (about 2 GB in all): make lab TORCH=cpu"
fi

if [ -x "$venv/bin/python" ]; then
    is_supported "$venv/bin/python" || fail "$venv holds another Python. Remove it (make clean) and try again."
fi
# an environment that was left half-made has a Python without pip
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv" || fail "'$python -m venv' failed.
On Debian and Ubuntu the package python3-venv is needed: sudo apt install python3-venv"
fi

echo "Installing into $venv with $("$venv/bin/python" --version); this takes some minutes."
if [ "${TORCH:-}" = cpu ]; then
    set -- --extra-index-url https://download.pytorch.org/whl/cpu
else
    set --
fi
"$venv/bin/python" -m pip install "$@" -r requirements.lock &&
    "$venv/bin/python" -m pip install --quiet --no-deps -e . || fail "pip failed; its message stands above.
Without a network, or behind a proxy that pip does not know, nothing can be downloaded: mend that, then run
the same command again. What was downloaded is kept."
"$venv/bin/python" tools/quiet_jupyter.py || fail "nbgrader's menus could not be kept out of JupyterLab."
