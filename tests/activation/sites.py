"""Environments for the tests of the installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
PTH = ROOT / 'swift_gkd_plugin.pth'


def make_site(directory: Path, *, wheel: Path | None = None, pth: bool = False) -> Path:
    """A virtual environment that sees the packages of this one but runs none of its .pth files, and so has no plugin of ours.

    Args:
        wheel: Is installed into it.
        pth: The plugin's .pth is there, the plugin is not.

    Returns:
        Its Python.
    """
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', directory], check=True)
    python = directory / 'bin' / 'python'
    purelib = Path(subprocess.check_output([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], text=True).strip())
    (purelib / 'everything_else.pth').write_text(sysconfig.get_path('purelib') + '\n')
    if wheel is not None:
        pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index']
        subprocess.run([*pip, wheel], check=True)
    if pth:
        shutil.copy(PTH, purelib)
    return python


def build_wheel(directory: Path) -> Path:
    """A wheel of the plugin, built from a copy of its files because setuptools leaves traces where it builds."""
    source = directory / 'source'
    shutil.copytree(ROOT / 'swift_gkd_plugin', source / 'swift_gkd_plugin', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE', PTH.name):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--no-index', '--wheel-dir', directory]
    subprocess.run([*pip, source], check=True)
    return next(directory.glob('*.whl'))
