"""Generalized Knowledge Distillation for ms-swift and Megatron-SWIFT."""

from .versions import __version__ as __version__


def register() -> None:
    """Take over ``--rlhf_type gkd`` in this Python process: the way for scripts that call ``swift.pipelines.rlhf_main``.

    The command lines ``swift rlhf`` and ``megatron rlhf`` need no call: the installed package activates itself.

    Raises:
        RuntimeError: The installed ms-swift is not one of the supported versions.
    """
    from .activation import register as _register

    _register()
