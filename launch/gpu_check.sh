#!/usr/bin/env bash
# Checks this project on the GPU of this machine, in a few minutes: launch/gpu_check.sh
# Runs from a checkout and needs no network. docs/gpu.md lists the packages that it needs.
# --device cpu is a dry run with tiny shapes; --only STAGE,STAGE runs only these stages.
# The environment variable PYTHON selects the Python.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m dist_sae.bench.gpu_check "$@"
