#!/usr/bin/env bash
# Installs into a virtual environment of its own and runs every check. Needs Python >= 3.11, and
# root, Debian's iproute2 and tini for tests/deploy, which runs pods in namespaces of their own.
# Options go to pytest, for example: launch/test.sh -k loader
# Two tests at a time, one thread each: most of them wait for processes and servers.
set -euo pipefail
cd "$(dirname "$0")/.."

# what pip does not have
missing=()
command -v ip > /dev/null || missing+=(iproute2)
command -v tini > /dev/null || missing+=(tini)
if ((${#missing[@]})); then
    if ((EUID)) || ! command -v apt-get > /dev/null; then
        echo "tests/deploy needs ${missing[*]}: install them (apt-get install), or run this as root" >&2
        exit 2
    fi
    apt-get update --quiet --quiet
    DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}"
fi

./launch/install.sh .venv-test '.[dev]'
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy
$bin/lint-imports
OMP_NUM_THREADS=1 exec $bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
