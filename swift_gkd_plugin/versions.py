"""Which plugin runs on which ms-swift.

Nothing heavy is imported: the start-up hook reads this file before torch or ms-swift.
"""

from __future__ import annotations

__version__ = '0.1.0'


def banner(trainer: type) -> str:
    """The first line of a run: which trainer, which plugin and which host.

    Args:
        trainer: The class of the trainer that runs.
    """
    from swift.version import __version__ as host

    return f'{trainer.__module__}.{trainer.__qualname__} of swift-gkd-plugin {__version__} runs on ms-swift {host}.'
