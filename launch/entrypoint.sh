#!/usr/bin/env bash
# Container entry point: `entrypoint.sh train RUN.yaml ...` runs `dist-sae train RUN.yaml ...` with
# a writable home on a read-only root file system.
set -euo pipefail

: "${HOME:=/scratch/home}"
mkdir -p "$HOME" || { echo "error: HOME=$HOME: cannot be created; mount a volume at /scratch" >&2; exit 2; }
exec dist-sae "$@"
