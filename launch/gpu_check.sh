#!/usr/bin/env bash
# Checks this project on the GPU of this machine, in a few minutes: launch/gpu_check.sh
# Runs from a checkout, without a network; see docs/gpu.md for the packages it needs.
# --device cpu is a dry run with tiny shapes, --only STAGE,STAGE runs some; PYTHON names the Python.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m dist_sae.bench.gpu_check "$@"
