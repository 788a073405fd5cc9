#!/usr/bin/env bash
# Installs into a virtual environment of its own and runs every check. Needs Python >= 3.11.
# Options go to pytest, for example: launch/test.sh -k loader
# Two tests at a time, one thread each: most of them wait for processes and servers.
set -euo pipefail
cd "$(dirname "$0")/.."

./launch/install.sh .venv-test '.[dev]'
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy
$bin/lint-imports
OMP_NUM_THREADS=1 exec $bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
