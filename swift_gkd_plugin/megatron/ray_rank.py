"""What runs in a worker of Ray: one rank of the training, as torchrun would start it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..arguments import OptionError
from ..versions import __version__


class Rank:
    """An actor. Ray pickles it by its name, so that a node where the plugin is not installed cannot make one."""

    def run(self, enter: Callable[[], None], argv: Sequence[str], directory: str, version: str) -> dict[str, Any]:
        """Train, in the process group that the environment describes.

        Args:
            enter: Activates the plugin in this process.
            argv: Options of ``megatron rlhf``.
            directory: Where the command was given. Relative paths mean what they mean there, if this node has it.
            version: Of the plugin where the command was given.

        Returns:
            Where the checkpoints are.

        Raises:
            OptionError: This node has another version of the plugin.
        """
        if version != __version__:
            raise OptionError(
                f'--use_ray: swift-gkd-plugin {__version__} on node {os.uname().nodename} and {version} where the command was given; '
                'install the same version on every node.'
            )
        if os.path.isdir(directory):
            os.chdir(directory)
        sys.argv = ['megatron', *argv]
        enter()
        from swift.megatron import megatron_rlhf_main

        found = megatron_rlhf_main()
        return {name: found[name] for name in ('last_model_checkpoint', 'best_model_checkpoint', 'best_metric')}
