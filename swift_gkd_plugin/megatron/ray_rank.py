"""What runs in a worker of Ray: one rank of the training, as torchrun would start it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray

from ..arguments import OptionError
from ..versions import __version__


def enter_node(directory: str, version: str) -> None:
    """
    Args:
        directory: Where the command was given. Relative paths mean what they mean there, if this node has it.
        version: Of the plugin where the command was given.

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


class Rank:
    """An actor. Ray pickles it by its name, so that a node where the plugin is not installed cannot make one."""

    def run(
        self,
        enter: Callable[[], None],
        argv: Sequence[str],
        directory: str,
        version: str,
        engines: Sequence[ray.ObjectRef],
        teachers: Sequence[ray.ObjectRef],
    ) -> dict[str, Any]:
        """Train, in the process group that the environment describes.

        Args:
            enter: Activates the plugin in this process.
            argv: Options of ``megatron rlhf``.
            directory, version: See :func:`enter_node`.
            engines: What is there once the engines on other GPUs answer. It is waited for when all has been checked that can be checked
                without them, and before weights load.
            teachers: What is there once an engine of the teacher has ended. It does not come back: the run ends as it does when a teacher
                server gives up, with a checkpoint.

        Returns:
            Where the checkpoints are.

        Raises:
            OptionError: This node has another version of the plugin.
        """
        enter_node(directory, version)
        sys.argv = ['megatron', *argv]
        enter()
        from swift.megatron import megatron_rlhf_main

        from ..teachers.server import for_good
        from .pipeline import GKDPipeline

        if teachers:
            threading.Thread(target=lambda: ray.wait(list(teachers)) and for_good.set(), daemon=True).start()
        GKDPipeline.until_engines_answer = staticmethod(lambda: ray.get(list(engines)))
        found = megatron_rlhf_main()
        return {name: found[name] for name in ('last_model_checkpoint', 'best_model_checkpoint', 'best_metric')}
