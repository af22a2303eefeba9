"""What the installed plugin costs a Python process that has nothing to do with it: ``python -c pass``, with the plugin and without.

    python benchmarks/activation/startup.py [runs]

Makes three small virtual environments (nothing installed, the plugin from a wheel, the plugin as an editable install), starts Python in
them by turns and writes startup.csv. The environments take turns because a machine's speed drifts by more than what is measured.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def build(hook: str, directory: Path) -> Path:
    """A wheel by one of the hooks that pip calls: build_wheel for an installation, build_editable for ``pip install -e``."""
    code = f'from setuptools import build_meta; build_meta.{hook}({str(directory)!r})'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return max(directory.glob('*.whl'), key=lambda file: file.stat().st_mtime)


def make_environment(directory: Path, wheel: Path | None = None) -> Path:
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', directory], check=True)
    python = directory / 'bin' / 'python'
    if wheel:
        pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index']
        subprocess.run([*pip, wheel], check=True)
    return python


def seconds(python: Path) -> float:
    begin = time.perf_counter()
    subprocess.run([python, '-c', 'pass'], check=True)
    return time.perf_counter() - begin


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        pythons = {
            'without the plugin': make_environment(directory / 'without'),
            'wheel': make_environment(directory / 'wheel', build('build_wheel', directory)),
            'editable': make_environment(directory / 'editable', build('build_editable', directory)),
        }
        times = {name: [] for name in pythons}
        for _ in range(runs):
            for name, python in pythons.items():
                times[name].append(seconds(python))
    rows = []
    for name, values in times.items():
        # Each run is compared with the one just before it in the environment without the plugin.
        more = [value - base for value, base in zip(values, times['without the plugin'], strict=True)]
        rows.append(
            {
                'environment': name,
                'runs': runs,
                'median_ms': f'{1e3 * statistics.median(values):.3f}',
                'more_than_without_ms': f'{1e3 * statistics.median(more):.3f}',
                'fastest_ms': f'{1e3 * min(values):.3f}',
                'python': sys.version.split()[0],
            }
        )
        print(rows[-1])
    with open(HERE / 'startup.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
