#!/usr/bin/env bash
# Installs into the virtual environment .venv-test and runs every check, including the tests marked
# `system`. Needs Python >= 3.11 and root. Installs the Debian packages below if one is missing:
# servers for metrics, npm for Grafana's types, tools that run pods in Linux namespaces, a browser.
# Options go to pytest, for example: launch/test.sh -k loader
# Runs four tests at a time with one thread each, even on two cores, because most tests wait for
# processes and servers.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A packages=(
    [prometheus]=prometheus
    [prometheus-alertmanager]=prometheus-alertmanager
    [prometheus-pushgateway]=prometheus-pushgateway
    [npm]=npm
    [ip]=iproute2
    [tini]=tini
    [chromium]=chromium
)
missing=()
for command in "${!packages[@]}"; do
    command -v "$command" > /dev/null || missing+=("${packages[$command]}")
done
if ((${#missing[@]})); then
    if ((EUID)) || ! command -v apt-get > /dev/null; then
        echo "the tests need ${missing[*]}: install them (apt-get install), or run this as root" >&2
        exit 2
    fi
    apt-get update --quiet --quiet
    DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}"
fi
if ! [ tests/monitoring/node_modules -nt tests/monitoring/package.json ]; then
    npm install --prefix tests/monitoring --no-package-lock --no-fund --no-audit --silent
    touch tests/monitoring/node_modules
fi

./launch/install.sh .venv-test '.[dev]'
bin=.venv-test/bin
$bin/ruff format --check .
$bin/ruff check .
unset PYTHONDONTWRITEBYTECODE # else each worker and each program compiles all modules again
$bin/python -m pytest --collect-only --quiet > /dev/null & # compiles all modules for the workers
$bin/mypy
$bin/lint-imports
wait
exec $bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"
