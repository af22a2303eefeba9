#!/usr/bin/env bash
# Lint, format and all tests, by two workers. Arguments go to pytest: ./test.sh tests/activation -k yaml -n 0
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup.sh
source .venv/bin/activate
ruff check .
ruff format --check .
# The models are tiny: more threads only get in each other's way.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=15 "$@"
