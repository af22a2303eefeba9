"""benchmarks/gpu: the script for a GPU that nobody watches, dry."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[1] / 'benchmarks' / 'gpu'

# A part whose cases end in every way there is.
UNRULY = """
import os, time

def run(case, meter):
    yield {'what': 'before', 'ms': 1.0}
    if case['name'] == 'raises':
        raise ValueError('no such number')
    if case['name'] == 'lacks':
        import no_such_package
    if case['name'] == 'dies':
        os.abort()
    if case['name'] == 'hangs':
        time.sleep(600)
    yield {'what': os.environ.get('COLOUR', 'after'), 'ms': 2.0}
"""


@pytest.mark.e2e
def test_all_of_it_runs_dry(tmp_path):
    command = [sys.executable, str(GPU / 'first_hour.py'), '--device', 'cpu', '--tiny', '--minutes', '8', '--out', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert {row['status'] for row in rows} <= {'ok', 'not here', 'not installed'}, done.stdout
    measured = [row for row in rows if row['status'] == 'ok' and not row.get('end')]
    assert all(math.isfinite(value) for row in measured for value in row.values() if isinstance(value, float))
    assert {row['part'] for row in measured} == {'checks', 'products', 'sweeps', 'heads', 'moving', 'training'}
    assert {row['what'] for row in measured if row['part'] == 'heads'} >= {'products', 'ours', 'ms-swift', 'trl', 'products again'}
    assert any(row['part'] == 'sweeps' and 'normalise' in row['what'] for row in measured)
    table = (tmp_path / 'table.md').read_text()
    assert done.stdout.endswith(table + '\n') and len({line.count(' | ') for line in table.splitlines()[2:]}) == 1
    assert not (tmp_path / 'scratch').exists()


def test_what_fails_is_recorded_and_skipped(tmp_path, monkeypatch):
    """And a second run does what is left."""
    monkeypatch.syspath_prepend(str(GPU))
    (tmp_path / 'unruly.py').write_text(UNRULY)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    import first_hour

    def unruly(tiny):
        return [dict(name=name, limit=2) for name in ('raises', 'lacks', 'dies', 'hangs', 'ends')] + [
            dict(name='in red', env={'COLOUR': 'red'})
        ]

    monkeypatch.setitem(first_hour.PARTS, 'unruly', 1)
    monkeypatch.setattr(first_hour.plan, 'of', lambda part, tiny: unruly(tiny))

    def run(minutes: float) -> list[tuple]:
        hour = first_hour.Run(Namespace(out=tmp_path / 'out', minutes=minutes, parts=['unruly'], device='cpu', tiny=True))
        hour.parts()
        rows = [json.loads(line) for line in hour.file.read_text().splitlines()]
        assert len(hour.save_table().splitlines()) == 2 + sum(not row.get('end') for row in rows)
        return [(row['case'], row['status'], row.get('what'), row.get('why', '')) for row in rows if not row.get('end')]

    found = run(4)
    assert [row[:3] for row in found] == [
        ('raises', 'ok', 'before'),
        ('raises', 'failed', None),
        ('lacks', 'ok', 'before'),
        ('lacks', 'not installed', None),
        ('dies', 'ok', 'before'),
        ('dies', 'failed', None),
        ('hangs', 'ok', 'before'),
        ('hangs', 'failed', None),
        ('ends', 'ok', 'before'),
        ('ends', 'ok', 'after'),
        ('in red', 'ok', 'before'),
        ('in red', 'ok', 'red'),
    ]
    whys = {row[0]: row[3] for row in found if row[3]}
    assert whys['raises'] == 'ValueError: no such number' and whys['lacks'] == 'no_such_package' and whys['hangs'] == 'took too long'
    assert 'ended with -6' in whys['dies']
    again = run(0)
    assert [row[:2] for row in again if row[0] in ('ends', 'in red')] == [row[:2] for row in found[-4:]]
    assert {row[:2] for row in again if row[0] not in ('ends', 'in red')} == {(n, 'not run') for n in ('raises', 'lacks', 'dies', 'hangs')}


def test_wheels_are_listed_and_their_size_is_checked(tmp_path, monkeypatch, capsys):
    listed = subprocess.run([sys.executable, str(GPU / 'wheels.py'), '--list'], capture_output=True, text=True, check=True).stdout
    names = {line.split('==')[0] for line in listed.splitlines() if not line.startswith('#')}
    assert {'ms-swift', 'transformers', 'peft', 'trl', 'accelerate'} <= names and 'torch' not in names
    monkeypatch.syspath_prepend(str(GPU))
    import wheels

    for name, megabytes in (('a', 25), ('b', 34)):
        with (tmp_path / f'{name}.whl').open('wb') as file:
            file.truncate(megabytes * 1_000_000)
    wheels.check_size(list(tmp_path.glob('*.whl')))
    assert '2 wheels, 59.0 MB of at most 60 MB' in capsys.readouterr().out
    with (tmp_path / 'a.whl').open('wb') as file:
        file.truncate(27_000_000)
    with pytest.raises(SystemExit, match=r'61\.0 MB of wheels, at most 60 MB'):
        wheels.check_size(list(tmp_path.glob('*.whl')))
