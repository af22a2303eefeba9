#!/usr/bin/env bash
# Trains a small teacher, distils it into a smaller student with `swift rlhf --rlhf_type gkd` and shows what the student has learnt.
set -euo pipefail
cd "$(dirname "$0")"
scripts/setup.sh
source .venv/bin/activate
exec python examples/quickstart/quickstart.py "$@"
