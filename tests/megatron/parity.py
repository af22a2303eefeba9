"""The parity table: every case in every layout against the run with one process, and that run against plain transformers.

python tests/megatron/parity.py [--layouts TP2 PP2 …] [--csv benchmarks/megatron/parity.csv]
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


def run_cases(layout: str, root: Path, models: Mapping[str, Path], train: Path) -> dict[str, Run]:
    root.mkdir(parents=True, exist_ok=True)
    datasets = make_datasets(train, root)
    jobs = {name: case | {'dataset': datasets[case['dataset']]} if 'dataset' in case else case for name, case in cases_of(layout).items()}
    runs = run_jobs(jobs, layout, root, models, train, timeout=600)
    return {name: run.ok() for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--layouts', nargs='+', default=[name for name in LAYOUTS if name != '1'])
    parser.add_argument('--csv', type=Path, default=Path(__file__).parents[2] / 'benchmarks' / 'megatron' / 'parity.csv')
    options = parser.parse_args()
    os.environ.update(helpers.OFFLINE)
    with tempfile.TemporaryDirectory() as directory:
        tiny = helpers.make_tiny_models(Path(directory, 'tiny'))
        models = make_models(Path(directory, 'models'), tiny)
        alone = run_cases('1', Path(directory, '1'), models, tiny.train)
        rows = []
        for layout in options.layouts:
            for name, run in run_cases(layout, Path(directory, layout), models, tiny.train).items():
                loss, gradient = compared(run, alone[name])
                rows.append((layout, LAYOUTS[layout][0], name, f'{run.losses[0]:.8f}', f'{loss:.1e}', f'{gradient:.1e}'))
                print(*rows[-1], sep='\t', flush=True)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('layout', 'ranks', 'case', 'loss of the first step', 'loss difference', 'worst relative gradient difference'))
        writer.writerows(rows)
    print(f'{len(rows)} rows of {len(CASES)} cases: {options.csv}')


if __name__ == '__main__':
    main()
