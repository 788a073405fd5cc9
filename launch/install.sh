#!/usr/bin/env bash
# Installs WHAT (".", the default, or ".[dev]") at the pinned versions.
# Usage: launch/install.sh VENV [WHAT]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: launch/install.sh VENV [WHAT]} what=${2:-.}

usable() { "$1" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if ! usable "$venv/bin/python"; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "Python 3.11 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
    "$python" -m venv --clear "$venv"
fi
echo "installing $what into $venv (takes some minutes the first time) ..." >&2
"$venv/bin/python" -m pip install --quiet --constraint launch/constraints.txt \
    --config-settings editable_mode=compat --editable "$what"
# compat: else a notebook in the parent folder of a clone named dist_sae imports the clone's folder
