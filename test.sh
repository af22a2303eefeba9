#!/usr/bin/env bash
# Lint, format and all tests. Arguments go to pytest: ./test.sh tests/activation -k yaml
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup.sh
source .venv/bin/activate
ruff check .
ruff format --check .
exec python -m pytest --durations=15 "$@"
