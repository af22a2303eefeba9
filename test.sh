#!/usr/bin/env bash
# Lint, format and all tests, by two workers. Arguments go to pytest: ./test.sh tests/activation -k yaml -n 0
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup.sh
source .venv/bin/activate
ruff check .
ruff format --check .
# What DeepSpeed compiles; the lock of a run that was killed would be waited for without end.
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions
mkdir -p "$TORCH_EXTENSIONS_DIR" && find "$TORCH_EXTENSIONS_DIR" -name lock -delete
# The models are tiny: more threads only get in each other's way.
export OMP_NUM_THREADS=1
exec python -m pytest -n 2 --no-loadscope-reorder --durations=15 "$@"
