"""What starts the scripts of other tests: a failure, a hang and a stray process must not look like a run that went well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import helpers
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


def test_a_script_that_stays(run, tmp_path):
    (tmp_path / 'stays.py').write_text("import time; print('up', flush=True); time.sleep(300)")
    log = tmp_path / 'log.txt'
    started = starts.start(tmp_path / 'stays.py', modules=['json'], env={'COLOUR': 'red'}, cwd=tmp_path, log=log)
    while not log.read_text():
        time.sleep(0.05)
    assert run('pass')[0] == 0 and started.poll() is None  # others are served meanwhile
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert started.poll() is not None and log.read_text() == 'up\n'


TOLD = """
import os, sys, time
print(os.path.basename(sys.argv[0]), sys.argv[1:], os.environ['COLOUR'], os.environ.get('RANK'), os.environ.get('WORLD_SIZE'), flush=True)
time.sleep(300 * (sys.argv[1] == 'stay'))
sys.exit(3)
"""


def test_commands_of_scripts_run_in_forks(monkeypatch, tmp_path):
    """With their arguments, variables and ranks; their status and output come back, and a server ends with whoever has started it."""
    for name in ('rlhf', 'rollout'):
        (tmp_path / f'{name}.py').write_text(TOLD)
    monkeypatch.setattr(helpers, 'script', lambda command: [sys.executable, tmp_path / f'{Path(command).name}.py'])
    with commands.launchers(['json'], {}) as path:
        for launcher, ranks, told in (
            ('swift', {}, ['None None']),
            ('swift', {'NPROC_PER_NODE': '2'}, ['0 2', '1 2']),
            ('megatron', {}, ['0 1']),
        ):
            status, output = helpers.run([Path(path, launcher), 'rlhf', 'a b'], env={'COLOUR': 'red', **ranks}, cwd=tmp_path)
            assert status == 3 and sorted(output.splitlines()) == [f"rlhf.py ['a b'] red {rank}" for rank in told]
        with open(tmp_path / 'log.txt', 'w') as log:
            server = subprocess.Popen([Path(path, 'swift'), 'rollout', 'stay'], env={**os.environ, 'COLOUR': 'blue'}, stdout=log)
        while not (tmp_path / 'log.txt').read_text():
            time.sleep(0.05)
        (child,) = [int(pid) for pid in os.listdir('/proc') if pid.isdigit() and writes_to(pid, tmp_path / 'log.txt')]
        server.kill()
        server.wait()
        while starts.Started(child).poll() is None:
            time.sleep(0.05)


def writes_to(pid: str, path: Path) -> bool:
    """Whether a process is a fork with this output."""
    try:
        return 'fork_server' in Path(f'/proc/{pid}/cmdline').read_text() and os.readlink(f'/proc/{pid}/fd/1') == str(path)
    except OSError:
        return False
