#!/usr/bin/env bash
# Lint, format and all tests, by three workers: on two cores one of them often waits for a server or for ranks.
# Arguments go to pytest: ./test.sh tests/activation -k yaml -n 0
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup.sh
source .venv/bin/activate
ruff check .
ruff format --check .
# What DeepSpeed and torch compile; DeepSpeed would wait for the lock of a run that was killed without end.
export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions
export TORCHINDUCTOR_CACHE_DIR=$PWD/.venv/inductor
mkdir -p "$TORCH_EXTENSIONS_DIR" && find "$TORCH_EXTENSIONS_DIR" -name lock -delete
# The models are tiny: more threads only get in each other's way.
export OMP_NUM_THREADS=1
# Hundreds of processes import the same modules: what one has compiled the next one takes, whatever the environment says.
export PYTHONDONTWRITEBYTECODE=
exec python -m pytest -n 3 --no-loadscope-reorder --durations=15 "$@"
