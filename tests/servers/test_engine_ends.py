"""An engine beside a training process does not outlive it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import helpers

KILLED = """
import os, signal, sys
from pathlib import Path
from swift_gkd_plugin.teachers.engine import TeacherEngine
engine = TeacherEngine(sys.argv[1], 'float32', 1, sys.argv[2], None, Path('engine.log'))
Path('pid').write_text(str(engine.process.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_a_killed_process(tiny_models, tmp_path):
    started = [sys.executable, '-c', KILLED, tiny_models.teacher, helpers.VLLM_ENGINE_FLAGS]
    helpers.run(started, env=helpers.vllm_environment(), cwd=tmp_path)
    status = Path('/proc', (tmp_path / 'pid').read_text(), 'status')

    def lives() -> bool:
        return status.exists() and 'State:\tZ' not in status.read_text()  # ended, and nobody has asked how

    end = time.monotonic() + 60  # by itself it would answer for ever
    while lives() and time.monotonic() < end:
        time.sleep(0.1)
    assert not lives()
