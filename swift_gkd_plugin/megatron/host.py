"""Everything that the plugin changes in ms-swift for ``megatron rlhf --rlhf_type gkd``, read and tested with ms-swift 4.6.0.

``SEAMS`` works as in ``hf/host.py``. The plugin has no Megatron trainer yet: its options are parsed and checked, one that would have no
effect is refused, and the trainer of ms-swift runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import __version__
from ..arguments import OPTION_NAMES, GKDOptions, OptionError, check_values
from ..seams import Renamed, extended, for_gkd, forget_external_plugin, modern_command_line, option_fields, option_value, take_options

# Options of Megatron-SWIFT 3.x that command lines for gkd still carry.
RENAMED = {
    '--train_type': Renamed('--tuner_type'),
    '--lora_target_modules': Renamed('--target_modules', {'ALL': 'all-linear'}),
    '--save': Renamed('--output_dir'),
    '--save_interval': Renamed('--save_steps'),
    '--eval_interval': Renamed('--eval_steps'),
    '--log_interval': Renamed('--logging_steps'),
    '--max_epochs': Renamed('--num_train_epochs'),
    '--num_workers': Renamed('--dataloader_num_workers'),
    '--distributed_backend': Renamed('--ddp_backend'),
    '--load': Renamed('--mcore_model'),
    '--adapter_load': Renamed('--mcore_adapter'),
    '--load_safetensors': Renamed(dropped='the weights of --model are always read from its safetensors.'),
}


def take_over_arguments(module: ModuleType) -> dict[str, Any]:
    """``swift.megatron.arguments.rlhf_args``: our options, checked first."""
    cls = module.MegatronRLHFArguments

    @for_gkd(cls, '__post_init__')
    def check_first(self: Any, stock: Callable[[], None]) -> None:
        _check_options(self)
        stock()

    @for_gkd(cls, '_init_model_kwargs')
    def check_again_after_plugins(self: Any, stock: Callable[[], None]) -> None:
        # See hf/host.py.
        stock()
        _check_options(self)
        forget_external_plugin(self)

    return {'MegatronRLHFArguments': extended(cls, option_fields())}


def _check_options(args: Any) -> None:
    take_options(args)
    check_values(args)
    default = GKDOptions()
    for name in OPTION_NAMES:
        value = getattr(args, name)
        if value != getattr(default, name):
            raise OptionError(
                f'--{name} {value}: the plugin has no Megatron trainer yet and the one of ms-swift does not know this option; '
                'leave it out, or train with `swift rlhf`.'
            )


def take_over_trainer(module: ModuleType) -> None:
    """``swift.megatron.trainers.gkd_trainer``: where the plugin's trainer will be put in."""
    cls = module.MegatronGKDTrainer
    stock = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        from swift.utils import get_logger
        from swift.version import __version__ as host

        get_logger().warning(
            f'swift-gkd-plugin {__version__} has no Megatron trainer yet: {cls.__name__} of ms-swift {host} runs. '
            f'Without effect: {", ".join(f"--{name}" for name in OPTION_NAMES)}.'
        )
        stock(self, *args, **kwargs)

    cls.__init__ = __init__


def take_over_pipeline(module: ModuleType) -> None:
    """``swift.megatron.pipelines.train.rlhf``: old command lines are rewritten before parsing."""
    cls = module.MegatronRLHF
    cls.args_class = module.MegatronRLHFArguments
    parse = cls._parse_args

    def _parse_args(self: Any, args: Any = None) -> Any:
        argv = modern_command_line(args, RENAMED, self.args_class)
        if argv is not args:  # a command line for gkd
            argv = _without_vllm_unless_asked_for(argv)
        return parse(self, argv)

    cls._parse_args = _parse_args


def _without_vllm_unless_asked_for(argv: list[str]) -> list[str]:
    """Stock turns vLLM on for every rlhf_type and then stops, because --vllm_mode has no default. 3.x had it off."""
    if option_value(argv, '--use_vllm') is not None or option_value(argv, '--vllm_mode') is not None:
        return argv
    from swift.utils import get_logger

    get_logger().warning('Neither --use_vllm nor --vllm_mode is given: without vLLM all responses come from the dataset.')
    return [*argv, '--use_vllm', 'false']


SEAMS = {
    'swift.megatron.arguments.rlhf_args': take_over_arguments,
    'swift.megatron.trainers.gkd_trainer': take_over_trainer,
    'swift.megatron.pipelines.train.rlhf': take_over_pipeline,
}
