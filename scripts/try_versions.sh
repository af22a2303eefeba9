#!/usr/bin/env bash
# Runs tests with other versions of packages than scripts/setup.sh installs:
#
#     scripts/try_versions.sh transformers==5.16.0 peft==0.19.0 -- tests/hf/test_training.py -k lora
#
# They go into a copy of .venv, made of hard links and removed afterwards. What they ask for does not come along: name it too.
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."

packages=()
while (($#)) && [[ $1 != -- ]]; do
    packages+=("$1")
    shift
done
if ! ((${#packages[@]})) || (($# < 2)) || [[ ! -x .venv/bin/python ]]; then
    echo "try_versions.sh: scripts/setup.sh first, then PACKAGE==VERSION ... -- ARGUMENTS OF PYTEST" >&2
    exit 2
fi
shift

copy=$(mktemp -d "$PWD/.venv/try.XXXXXX")
trap 'rm -rf "$copy"' EXIT
cp -al .venv/!(try.*|inductor|torch_extensions) "$copy"
# pip and sed replace files and never write into them, so .venv keeps its own.
grep -lI -d skip "^#!$PWD/.venv/" "$copy"/bin/* | xargs sed -i "1s|^#!$PWD/.venv/|#!$copy/|"
"$copy/bin/python" -m pip install --quiet --no-deps --no-build-isolation "${packages[@]}"
export PATH="$copy/bin:$PATH" TORCH_EXTENSIONS_DIR=$copy/torch_extensions TORCHINDUCTOR_CACHE_DIR=$copy/inductor OMP_NUM_THREADS=1
python -m pip freeze --exclude-editable | grep -iE '^(accelerate|deepspeed|mcore|megatron|ms_swift|peft|torch|transformers|triton|trl)[_=-]'
python -m pytest "$@"
