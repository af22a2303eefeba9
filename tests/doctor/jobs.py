"""Many calls of ``swift-gkd doctor`` in one process: ``python jobs.py jobs.json``; one process saves the ten seconds of imports."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from swift_gkd_plugin.command import main

for job in json.loads(Path(sys.argv[1]).read_text()):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(job['words'])
    Path(job['result']).write_text(json.dumps({'status': status, 'printed': printed.getvalue()}))
