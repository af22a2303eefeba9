"""Which plugin runs on which ms-swift.

Nothing heavy is imported: the start-up hook reads this file before torch or ms-swift.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = '0.1.0'

# What was tried lies inside; the same as in pyproject.toml.
TRIED = {
    'torch': '>=2.10,<2.15',
    'transformers': '>=5.8,<5.20',
    'trl': '>=0.29,<0.30',
    'peft': '>=0.19,<0.21',
    'accelerate': '>=1.10,<2',
    'vllm': '>=0.32,<0.33',
    'deepspeed': '>=0.19,<0.20',
    'megatron-core': '>=0.16.0,<0.17',
    'mcore-bridge': '>=1.6.4,<=1.6.5',
}


def untried() -> list[str]:
    """A line for each installed package whose version is outside of what was tried. pip keeps to the ranges, an image of somebody else's
    does not."""
    from packaging.specifiers import SpecifierSet

    lines = []
    for name, tried in TRIED.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if not SpecifierSet(tried).contains(installed, prereleases=True):
            lines.append(f'{name} {installed}: swift-gkd-plugin {__version__} was tried with {name}{tried}; the run goes on, untested.')
    return lines


def banner(trainer: type) -> str:
    """The first line of a run: which trainer, which plugin and which host.

    Args:
        trainer: The class of the trainer that runs.
    """
    from swift.version import __version__ as host

    return f'{trainer.__module__}.{trainer.__qualname__} of swift-gkd-plugin {__version__} runs on ms-swift {host}.'
