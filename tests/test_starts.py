"""What starts the scripts of other tests: a failure, a hang and a stray process must not look like a run that went well."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import starts

SCRIPT = """
import json, os, sys, time
print('here', os.environ.get('RANK'), os.environ['COLOUR'], os.getcwd(), json.__name__, flush=True)
exec(sys.argv[1])
"""


@pytest.fixture
def run(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)

    def run(code: str, ranks: int = 0, timeout: float = 60) -> tuple[int, str]:
        return starts.run(script, code, modules=['json'], ranks=ranks, env={'COLOUR': 'red'}, cwd=tmp_path, timeout=timeout)

    return run


def test_status_and_output(run, tmp_path):
    assert run('pass') == (0, f'here None red {tmp_path} json\n')
    status, output = run('raise SystemExit(3)')
    assert status == 3 and output.startswith('here')
    status, output = run('1 / 0')
    assert status == 1 and 'ZeroDivisionError' in output


def test_a_rank_that_fails_ends_the_others(run):
    begin = time.monotonic()
    status, output = run('time.sleep(300 * (os.environ["RANK"] != "1")); sys.exit(5)', ranks=3)
    assert status == 5 and output.count('here') == 3 and time.monotonic() - begin < 200


def test_ranks_meet(run):
    code = 'import torch.distributed as d; d.init_process_group("gloo"); r = [None] * 2; d.all_gather_object(r, d.get_rank()); print(r)'
    status, output = run(code, ranks=2)
    assert status == 0 and output.count('[0, 1]') == 2


def test_what_hangs_is_ended_with_all_that_it_started(run, tmp_path):
    left = tmp_path / 'left.json'
    code = f'p = os.fork(); open({str(left)!r}, "w").write(json.dumps(p)) if p else None; time.sleep(300)'
    with pytest.raises(AssertionError, match='no end after 2 s'):
        run(code, timeout=2)
    pid = json.loads(left.read_text())
    for _ in range(100):
        if not os.path.exists(f'/proc/{pid}') or 'Z' in Path(f'/proc/{pid}/stat').read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f'{pid} is alive')
    assert run('pass')[0] == 0  # and the next one is served


def test_a_server_that_can_not_start_says_why(tmp_path):
    with pytest.raises(AssertionError, match='no_such_module'):
        starts.run(tmp_path, modules=['no_such_module'], env={}, cwd=tmp_path, timeout=60)
