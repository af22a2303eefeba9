"""The wheels with which `swift rlhf` runs beside a torch that is there already, for a machine without a network.

    python benchmarks/gpu/wheels.py --list           # what they are; needs no network
    python benchmarks/gpu/wheels.py --out DIR        # fetch them, with pip as it is configured here, and build the plugin's own
    python benchmarks/gpu/wheels.py --check          # on the other machine: what has to be there besides, and is it

and there

    python -m pip install --no-index --no-deps --target SITE DIR/*.whl
    PYTHONPATH=SITE python benchmarks/gpu/first_hour.py --out RESULTS

They are the packages that a run of `swift rlhf --rlhf_type gkd` imports, in the versions that the tests have run with: pure Python
but for a few small ones that a machine with torch seldom has, which are compiled, for CPython 3.12 on Linux. What is large and
compiled has to be there: torch, Triton, numpy and the like are not fetched.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 60

WHEELS = Path(__file__).with_suffix('.txt')
# Imported too, and there already: compiled, or what those need.
PRESENT = (
    'torch',
    'triton',
    'numpy',
    'pandas',
    'pyarrow',
    'pillow',
    'psutil',
    'PyYAML',
    'regex',
    'safetensors',
    'scipy',
    'sentencepiece',
    'simplejson',
    'tokenizers',
    'xxhash',
    'aiohttp',
    'aiosignal',
    'aiohappyeyeballs',
    'multidict',
    'yarl',
    'frozenlist',
    'propcache',
    'Jinja2',
    'MarkupSafe',
    'filelock',
    'sympy',
)


def fetch(out: Path, machine: str) -> None:
    platforms = [f'manylinux_2_{minor}_{machine}' for minor in (28, 27, 24, 17)] + [f'manylinux2014_{machine}']
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as directory:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '--dest', directory]
        command += ['--python-version', '3.12', '--implementation', 'cp', *(x for name in platforms for x in ('--platform', name))]
        subprocess.run([*command, '--requirement', str(WHEELS)], check=True)
        subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--wheel-dir', directory, str(ROOT)], check=True)
        found = sorted(Path(directory).glob('*.whl'))
        check_size(found)
        for wheel in found:
            shutil.move(wheel, out / wheel.name)
            print(f'{(out / wheel.name).stat().st_size / 1e6:8.2f} MB  {wheel.name}')


def check_size(wheels: list[Path]) -> None:
    mb = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    if mb > LIMIT_MB:
        sys.exit(f'wheels.py: {mb:.1f} MB of wheels, at most {LIMIT_MB} MB')
    print(f'{len(wheels)} wheels, {mb:.1f} MB of at most {LIMIT_MB} MB')


def check() -> None:
    missing = 0
    for name in PRESENT:
        try:
            print(f'{name} {version(name)}')
        except PackageNotFoundError:
            missing += 1
            print(f'{name} is missing')
    sys.exit(f'wheels.py: {missing} of {len(PRESENT)} are missing' if missing else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--list', action='store_true')
    what.add_argument('--out', type=Path, metavar='DIR')
    what.add_argument('--check', action='store_true')
    parser.add_argument('--machine', default='x86_64', help='processor of the other machine')
    args = parser.parse_args()
    if args.list:
        print(WHEELS.read_text(), end='')
    elif args.out:
        fetch(args.out, args.machine)
    else:
        check()


if __name__ == '__main__':
    main()
