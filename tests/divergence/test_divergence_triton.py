"""The Triton kernels in Triton's interpreter: on a CPU, the same numbers as the torch path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_kernels_in_the_interpreter():
    pytest.importorskip('triton', reason='Triton is not installed: the kernels cannot be interpreted')
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name('triton_worker.py'))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]
