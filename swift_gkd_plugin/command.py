"""``swift-gkd``: what the plugin has beside training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

from .doctor import __main__ as doctor
from .versions import __version__

# Each is given the words behind its name and returns the exit status.
COMMANDS = {'doctor': (doctor.main, 'look at this environment, and at a training command before it is run')}

USAGE = 'usage: swift-gkd COMMAND …\n\n' + '\n'.join(f'  {name:<10}{what}' for name, (_, what) in COMMANDS.items())


def main(words: Optional[Sequence[str]] = None) -> int:
    """
    Args:
        words: Of the command line, without the program; those of this process if left out.

    Returns:
        The exit status: 2 for a command that there is not, else the command's.
    """
    words = sys.argv[1:] if words is None else list(words)
    if words[:1] in (['-h'], ['--help']):
        print(USAGE)
        return 0
    if words[:1] == ['--version']:
        print(__version__)
        return 0
    if not words or words[0] not in COMMANDS:
        print(USAGE if not words else f'swift-gkd: {words[0]} is none of its commands.\n\n{USAGE}', file=sys.stderr)
        return 2
    return COMMANDS[words[0]][0](words[1:])
