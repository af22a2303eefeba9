"""The parity table: every case in every layout against the run with one process, and that run against plain transformers.

python tests/megatron/parity.py [--layouts TP2 PP2 …] [--csv benchmarks/megatron/parity.csv]
python tests/megatron/parity.py --teachers: a second table, of teachers on a layout of their own, with the same limits.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers
from cases import CASES, cases_of, compared, make_datasets
from models import make_models
from runs import LAYOUTS, Run, run_jobs
from teacher_cases import PAIRS, run_alone, run_pairs

HEADER = ('layout', 'ranks', 'case', 'loss of the first step', 'loss difference', 'worst relative gradient difference')


def run_cases(layout: str, root: Path, models: Mapping[str, Path], train: Path) -> dict[str, Run]:
    root.mkdir(parents=True, exist_ok=True)
    datasets = make_datasets(train, root)
    jobs = {name: case | {'dataset': datasets[case['dataset']]} if 'dataset' in case else case for name, case in cases_of(layout).items()}
    runs = run_jobs(jobs, layout, root, models, train, timeout=600)
    return {name: run.ok() for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--layouts', nargs='+', default=[name for name in LAYOUTS if name != '1' and cases_of(name)])
    parser.add_argument('--csv', type=Path, default=Path(__file__).parents[2] / 'benchmarks' / 'megatron' / 'parity.csv')
    parser.add_argument('--teachers', action='store_true')
    options = parser.parse_args()
    os.environ.update(helpers.OFFLINE)
    with tempfile.TemporaryDirectory() as directory:
        tiny = helpers.make_tiny_models(Path(directory, 'tiny'))
        models = make_models(Path(directory, 'models'), tiny)
        if options.teachers:
            return teachers(Path(directory), models, tiny.train, options.csv.with_name('teacher_layouts.csv'))
        alone = run_cases('1', Path(directory, '1'), models, tiny.train)
        rows = []
        for layout in options.layouts:
            for name, run in run_cases(layout, Path(directory, layout), models, tiny.train).items():
                loss, gradient = compared(run, alone[name])
                rows.append((layout, LAYOUTS[layout][0], name, f'{run.losses[0]:.8f}', f'{loss:.1e}', f'{gradient:.1e}'))
                print(*rows[-1], sep='\t', flush=True)
    write(options.csv, HEADER, rows)
    print(f'{len(rows)} rows of {len(CASES)} cases: {options.csv}')


def teachers(root: Path, models: Mapping[str, Path], train: Path, path: Path) -> None:
    alone = run_alone(root / '1', models, train)
    rows = []
    for student, pairs in PAIRS.items():
        for name, run in run_pairs(student, root / student, models, train).items():
            loss, gradient = compared(run, alone[student][name])
            own = ' '.join(f'{option.removeprefix("teacher_")}={size}' for option, size in pairs[name][1].items())
            rows.append((student, own, name, f'{run.losses[0]:.8f}', f'{loss:.1e}', f'{gradient:.1e}'))
            print(*rows[-1], sep='\t', flush=True)
    write(path, ('layout of the student', 'layout of the teacher', *HEADER[2:]), rows)
    print(f'{len(rows)} rows: {path}')


def write(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == '__main__':
    main()
