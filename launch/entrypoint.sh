#!/usr/bin/env bash
# What a container runs: `entrypoint.sh train RUN.yaml ...` is `dist-sae train RUN.yaml ...`, with
# a home that can be written where the root file system cannot.
set -euo pipefail

: "${HOME:=/scratch/home}"
mkdir -p "$HOME" || { echo "error: HOME=$HOME: cannot be made; mount a volume at /scratch" >&2; exit 2; }
exec dist-sae "$@"
