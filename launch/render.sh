#!/usr/bin/env bash
# Regenerates the committed files that are derived from run files and code. Tests check that they
# are up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
dist_sae() { "${PYTHON:-.venv/bin/python}" -m dist_sae "$@"; }

for run in $(grep -l 'image:' launch/runs/*.yaml); do
    file=k8s/rendered/$(basename "$run")
    { echo "# Generated: dist-sae render $run --only kubernetes"; dist_sae render "$run" --only kubernetes; } > "$file.new"
    mv "$file.new" "$file"
done
dist_sae config metrics > monitoring/metrics.md
"${PYTHON:-.venv/bin/python}" launch/monitoring.py
"${PYTHON:-.venv/bin/python}" launch/reference.py
