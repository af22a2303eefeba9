"""examples/check_cluster: the script for machines with GPUs, dry, and with commands that end in every way there is."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import starts

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'
sys.path.insert(0, str(EXAMPLES / 'check_cluster'))

import check  # noqa: E402
import judging  # noqa: E402
from check import Matrix, Outcome  # noqa: E402
from judging import Run  # noqa: E402
from matrix import MATRIX, ROWS_PER_STEP, Configuration  # noqa: E402

MEGATRON_ON_CPU = Path(__file__).with_name('megatron') / 'cpu'

# Stands for `swift rlhf`: it behaves as an option says.
COMMAND = """
import json, os, subprocess, sys, time

options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
how, out = options['--how'], options['--output_dir']
print('trainer of swift-gkd-plugin' if how != 'stock' else 'trainer of ms-swift', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)
if how in ('hangs', 'leaves'):  # an engine, in a session of its own
    child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'], start_new_session=True)
    open(f'{out}/child', 'w').write(str(child.pid))
if how == 'hangs':
    print('step 2', flush=True)
    time.sleep(600)
if how == 'dies':
    raise SystemExit('Traceback:\\nValueError: a tensor of 3\\ntorch.distributed.elastic.ChildFailedError: rank 0')
if how == 'refused':
    raise SystemExit('swift-gkd-plugin: --beta 2.0: must be in [0, 1]\\nSomeError: exit')
if how == 'lacks':
    import no_such_package
norm = {'steep': 1.1}.get(how, 1.0)
losses = {'off': [0.5, 0.4, 0.31], 'nan': [0.5, float('nan'), 0.3], 'short': [0.5]}.get(how, [0.5, 0.4, 0.3])
with open(f'{out}/logging.jsonl', 'w') as file:
    file.writelines(json.dumps({'loss': loss, 'grad_norm': norm}) + '\\n' for loss in losses)
    file.write('{"cut' if how == 'cut' else '')
for rank, peak in enumerate((2 << 30, (7 if how == 'large' else 3) << 30)):
    open(f'{out}/peak-{rank}-0.json', 'w').write(str(peak))
"""
SERVER = """
import http.server, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Healthy).serve_forever()
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    (tmp_path / 'command.py').write_text(COMMAND)
    monkeypatch.setitem(check.LAUNCHERS, 'swift', (sys.executable, '-S', str(tmp_path / 'command.py')))

    def behaving(how: str, **more) -> Configuration:
        return Configuration(how, {'how': how}, **more)

    return behaving


def alive(pid: int) -> bool:
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rsplit(')', 1)[1].split()[0] != 'Z'


def test_every_way_to_end(commands, tmp_path):
    """None of them keeps the others from their turn, and nothing is left of any."""
    matrix = Matrix(tmp_path / 'out', gpus=['4', '5'], limit=3, capability=8.0)
    compared = dict(like='good')
    ends = [
        commands('good'),
        replace(commands('same', **compared), gpus=2),
        *(
            commands(how, **compared)
            for how in ('off', 'steep', 'nan', 'short', 'cut', 'dies', 'refused', 'lacks', 'stock', 'hangs', 'leaves')
        ),
        commands('after dies', like='dies'),
        commands('large', checks=(judging.frugal,), **compared),
        commands('four', gpus=4),
        commands('package', needs=('no_such.package',)),
        commands('fp8', capability=8.9),
    ]
    found = {}
    for end in ends:
        found[end.name] = matrix.check(end)
    status = {name: outcome.status for name, outcome in found.items()}
    assert {name for name, of_it in status.items() if of_it == 'passed'} == {'good', 'same', 'leaves'}
    for name, expected in {'lacks': 'not installed', 'package': 'not installed', 'four': 'needs 4 GPUs', 'fp8': 'needs others'}.items():
        assert status[name] == expected
    whys = {
        'off': '3.3e-02 off good, 0.0001 allowed; losses [0.5, 0.4, 0.31] and [0.5, 0.4, 0.3]',
        'steep': '1.0e-01 off good',
        'nan': 'a loss of nan',
        'short': '1 losses of 3 steps',
        'cut': 'JSONDecodeError',
        'dies': 'ValueError: a tensor of 3 (exit status 1)',
        'refused': 'swift-gkd-plugin: --beta 2.0: must be in [0, 1]',
        'stock': 'stock ms-swift has trained',
        'hangs': 'no end after 3 s; last line: step 2',
        'after dies': 'nothing to compare it with: dies: failed',
        'large': 'reserves 7.00 GiB, good 3.00 GiB',
        'lacks': 'no_such_package',
        'package': 'no_such.package',
    }
    for name, why in whys.items():
        assert why in found[name].why, found[name]
    assert found['good'].peak == 3 << 30 and 'as good: 0e+00 off' in found['same'].why
    assert not any(alive(int((tmp_path / 'out' / name / 'child').read_text())) for name in ('hangs', 'leaves'))
    visible = {name: (tmp_path / 'out' / name / 'output.log').read_text().split()[-1] for name in ('good', 'same')}
    assert visible == {'good': '4', 'same': '4,5'}
    text = check.table(list(found.values()))
    assert len({line.replace('\\|', '').count('|') for line in text.splitlines()}) == 1 and len(text.splitlines()) == 2 + len(ends)


def test_a_server_beside_the_training(commands, tmp_path):
    (tmp_path / 'server.py').write_text(SERVER)
    matrix = Matrix(tmp_path / 'out', gpus=['0', '1'], limit=20)
    server = (sys.executable, str(tmp_path / 'server.py'), '{port}')
    assert matrix.check(replace(commands('good', server=server), gpus=2)).status == 'passed'
    broken = (sys.executable, '-c', 'raise SystemExit("RuntimeError: no memory")', '{port}')
    outcome = matrix.check(replace(commands('same', server=broken), gpus=2))
    assert outcome.status == 'failed' and outcome.why == 'no server: RuntimeError: no memory'


def test_ended_from_outside(commands, tmp_path):
    """What is there by then is told, and what was running is gone."""
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES / 'check_cluster')!r})
import check
check.LAUNCHERS['swift'] = {check.LAUNCHERS['swift']!r}
check.MATRIX = tuple(check.Configuration(how, {{'how': how}}) for how in ('good', 'hangs', 'same'))
check.Matrix.make_inputs = lambda self: None
sys.argv = ['check.py', '--gpus', '0,1', '--out', {str(tmp_path / 'out')!r}]
sys.exit(check.main())
"""
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    child = tmp_path / 'out' / 'hangs' / 'child'
    while not (child.exists() and child.read_text()) and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and '1 passed, 0 failed, 0 not run' in output, output
    assert not alive(int(child.read_text()))


@pytest.fixture
def run(tmp_path):
    """A run with logged numbers: ``run('name', {'key': [values]}, peak=…)``."""

    def made(name: str, values: dict[str, list] | None = None, peak: int = 0, on_gpus: bool = True, **more) -> Run:
        directory = tmp_path / name
        directory.mkdir()
        steps = [dict(zip(values or {}, row, strict=True)) for row in zip(*(values or {}).values(), strict=True)]
        (directory / 'logging.jsonl').write_text(''.join(json.dumps(step) + '\n' for step in steps))
        (directory / 'peak-0-0.json').write_text(str(peak))
        return Run(name, directory, on_gpus, 'float32', **more)

    return made


@pytest.mark.parametrize(
    ('judge', 'right', 'wrong'),
    [
        (judging.moves_the_optimizer, {'optimizer/moved_gib': [0, 0.1, 0.1]}, {'optimizer/moved_gib': [0.1, 0, 0.1]}),
        (judging.moves_the_teacher, {'teacher/moved_gib': [0.1, 0.1, 0.2]}, {'teacher/moved_gib': [0.1, 0, 0.1]}),
        (judging.teaches_nothing, {'loss': [1e-9, 0.1, 0.1]}, {'loss': [1e-5, 0.1, 0.1]}),
        (judging.teacher_answers, {'source/teacher': [1.0, 1.0, 1.0]}, {'source/teacher': [1.0, 0.5, 1.0]}),
        (judging.few_batches_of_the_teacher, {'teacher/batches': [1, 1, 1]}, {'teacher/batches': [1, 4, 1]}),
        (
            judging.student_answers,
            {'source/student': [1, 1, 1], 'generation/tokens_per_second': [9, 9, 9]},
            {'source/student': [1, 1, 1], 'generation/tokens_per_second': [9, -9, 9]},
        ),
    ],
)
def test_judgements_of_logged_numbers(run, judge, right, wrong):
    assert judge(run('right', right), None) is None
    assert judge(run('wrong', wrong), None)
    assert judge(run('nothing', {'loss': [1.0, 1.0, 1.0]}), None)


def test_judgements_of_memory(run):
    without, teacher = run('without', peak=10 << 30), 8 << 30
    layers, model, more = run('a', peak=5 << 30, teacher_bytes=teacher), run('b', peak=10 << 30), run('c', peak=11 << 30)
    assert judging.frugal(model, without) is None and judging.frugal(more, without)
    assert judging.spares_half_the_teacher(layers, without) is None
    assert judging.spares_half_the_teacher(run('d', peak=7 << 30, teacher_bytes=teacher), without)
    assert judging.uses_two_devices(without, None)
    (without.directory / 'peak-0-1.json').write_text(str(9 << 20))
    assert judging.uses_two_devices(without, None) is None
    assert judging.frugal(run('e', peak=11 << 30, on_gpus=False), without) is None  # the same memory holds both


def test_judgements_of_engines(run):
    ahead = run('ahead')
    for age, wrong in (((0, 1, 1), False), ((0, 0, 0), True), ((0, 1, 2), True)):
        lines = [{'step': step + 1, 'gen_step': step - old} for step, old in enumerate(age)]
        (ahead.directory / 'completions.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        assert bool(judging.runs_ahead(ahead, None)) == wrong
    slept = 'INFO Sleep mode freed {} GiB memory, 0.5 GiB memory is still in use.\n'
    for log, wrong in ((slept.format(40.1) * 3, False), (slept.format(40.1) * 2, True), (slept.format(0.0) * 3, True)):
        (ahead.directory / 'teacher_engine_rank0.log').write_text(log)
        assert bool(judging.engine_sleeps(ahead, None)) == wrong
    (ahead.directory / 'teacher_engine_rank0.log').unlink()
    assert judging.engine_sleeps(ahead, None)


def test_bounds(run):
    fp32, bf16 = run('fp32'), replace(run('bf16'), dtype='bfloat16')
    assert judging.bound(fp32, fp32, None) == 1e-4 and judging.bound(bf16, fp32, None) == judging.bound(fp32, bf16, None) == 0.05
    assert judging.bound(bf16, fp32, 0.2) == 0.2
    assert judging.bound(replace(fp32, on_gpus=False), fp32, 0.2) == 1e-4  # without GPUs, fp32 tells layouts apart


def test_the_table_of_configurations():
    names = [c.name for c in MATRIX]
    directories = {''.join(filter(str.isalnum, name)) for name in names}
    assert len(directories) == len(names)
    for number, configuration in enumerate(MATRIX):
        assert configuration.like is None or configuration.like in names[:number], configuration
        assert 1 <= configuration.gpus <= 8 and ROWS_PER_STEP % configuration.ranks == 0
    assert [c.name for c in check.chosen(['TP 2'])] == ['one GPU', 'Megatron', 'TP 2']
    with pytest.raises(SystemExit, match='no configuration has such a name'):
        check.chosen(['TP 3'])


@pytest.mark.parametrize('command', ['swift', 'megatron'])
def test_every_command_line_holds(tmp_path, monkeypatch, command):
    """Options, values and layouts, as ``parse.py`` finds them in a dry run; it also finds what is wrong."""
    monkeypatch.syspath_prepend(Path(__file__).with_name('megatron'))
    import runs

    wrong, message = {
        'swift': ({'beta': 2}, '--beta 2.0: must be in [0, 1]'),
        'megatron': ({'tensor_model_parallel_size': 3}, 'does not divide the 1 ranks'),
    }[command]
    unknown = Configuration('unknown', {'gkd_temprature': 1}, command=command)
    configurations = [*(c for c in MATRIX if c.command == command), Configuration('wrong', wrong, command=command), unknown]
    matrix = Matrix(tmp_path, gpus=None)
    modules, env = {
        'swift': (starts.MODULES, {**starts.ENVIRONMENT, 'SWIFT_GKD_PLUGIN': '1'}),
        'megatron': (runs.MODULES, runs.CPU),
    }[command]

    def parse(argv, **how):
        status, output = starts.run(Path(argv[1]), *argv[2:], modules=modules, env=env, cwd=tmp_path, timeout=100)
        assert status == 0, output

    monkeypatch.setattr(check.subprocess, 'run', parse)
    found = matrix.parse(configurations)
    assert message in found.pop('wrong') and found.pop('unknown') == 'unknown: --gkd_temprature 1'
    assert not any(found.values()) and len(found) == len(configurations) - 2, found


@pytest.mark.e2e
@pytest.mark.megatron
@pytest.mark.timeout(1600)
def test_dry_with_real_commands(tmp_path):
    """One process with ``swift rlhf`` and with ``megatron rlhf``, and two ranks: the losses are one another's."""
    env = {'PYTHONPATH': str(MEGATRON_ON_CPU), 'MEGATRON_ON_CPU': '1', 'PYTHON': sys.executable}
    argv = ['bash', EXAMPLES / 'check_cluster.sh', '--dry', '--only', 'TP 2', '--limit', 500, '--out', tmp_path]
    status, output = helpers.run(argv, env=env, cwd=tmp_path, timeout=1500)
    outcomes = [Outcome(**json.loads(line)) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    found = {outcome.name: outcome for outcome in outcomes}
    assert status == 0, output[-3000:]
    assert [found[name].status for name in ('one GPU', 'Megatron', 'TP 2')] == ['passed'] * 3
    assert all(found[name].peak > 1 << 28 and found[name].seconds > 1 for name in ('one GPU', 'Megatron', 'TP 2'))
    assert len(list((tmp_path / 'TP_2').glob('peak-*.json'))) == 2
