"""Everything that the plugin changes in ms-swift for ``megatron rlhf --rlhf_type gkd``, read and tested with ms-swift 4.6.0.

``SEAMS`` works as in ``hf/host.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import field
from types import ModuleType
from typing import Any

from ..arguments import check_values
from ..checks import base_of_adapters, check_reference, teaches_as_base
from ..seams import (
    Renamed,
    allowed,
    become_ours,
    check_first,
    extended,
    for_gkd,
    modern_command_line,
    option_fields,
    option_value,
    recognise_base,
    take_options,
)
from ..sources import Draw
from .options import check_layout, check_supported, said_once

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
    """``swift.megatron.arguments.rlhf_args``: our options, checked before anything else happens."""
    cls = module.MegatronRLHFArguments

    check_first(cls, _check_options)
    recognise_base(cls, _recognise)

    @for_gkd(cls, '_check_teacher')
    def hide_what_is_refused(self: Any, stock: Callable[[], None]) -> None:
        # Stock refuses it between this call and that of _init_generation_batch_params.
        stock()
        self._allowed = ExitStack()
        self._allowed.enter_context(allowed(self))

    @for_gkd(cls, '_init_generation_batch_params')
    def count_generation_batches(self: Any, stock: Callable[[], None]) -> None:
        self._allowed.close()
        del self._allowed
        # Stock wants a row of every cycle for each rank. Ours share out what there is.
        self.generation_batch_size, self.steps_per_generation = self.resolve_generation_batch_size(
            self.generation_batch_size, self.steps_per_generation, self.global_batch_size, self.num_generations
        )
        self.per_device_generation_batch_size = -(-self.generation_batch_size // int(os.environ.get('WORLD_SIZE', 1)))

    @for_gkd(cls, 'init_iters')
    def count_every_row(self: Any, stock: Callable[..., None], train_dataset: Any, val_dataset: Any) -> None:
        # Stock drops what is left of an epoch and of the evaluation set. Ours is a shorter last step.
        evaluates = val_dataset is not None and self.eval_iters != 0
        if not hasattr(train_dataset, '__len__'):  # check_supported has seen to --train_iters
            self.eval_iters = int(evaluates)  # what counts is whether there are any
            return
        stock(train_dataset, val_dataset)
        counts = Draw.of(self).epoch_length(len(train_dataset), self.num_train_epochs or 1), len(val_dataset or ())
        steps, eval_steps = (-(-count // self.global_batch_size) for count in counts)
        if self.num_train_epochs is not None:
            self.train_iters = steps * self.num_train_epochs
        if self.save_strategy == 'epoch':
            self.save_steps = self.eval_steps = steps
        self.eval_iters = eval_steps if evaluates else 0

    adapters = ('teacher_adapters', list[str], field(default_factory=list, metadata={'help': 'LoRA adapters of a separate teacher.'}))
    return {'MegatronRLHFArguments': extended(cls, [*option_fields(), adapters])}


def _check_options(args: Any) -> None:
    with said_once():
        take_options(args)
        args.teacher_adapters = getattr(args, 'teacher_adapters', [])  # no field of stock's, if we came by --external_plugins
        if args.lmbda > 0 and not args.use_vllm and args.gkd_on_missing_engine == 'dataset':
            _warn(f'--lmbda {args.lmbda} without vLLM: --gkd_on_missing_engine dataset trains on responses of the dataset instead.')
            args.lmbda = 0.0
        check_supported(args)  # first: some of check_values reads options that only `swift rlhf` has
        check_values(args)
        check_layout(args)


def _recognise(args: Any, teacher: str | None) -> None:
    with said_once():
        lora = args.tuner_type == 'lora'
        check_reference(args, None if lora else f'--tuner_type {args.tuner_type}: there is no adapter to switch off; use lora.')
        teacher = base_of_adapters(args, teacher, lora)
        shared = teaches_as_base(args, teacher, lora)
    args._teacher_use_disable_adapter = shared
    args.teacher_model = None if shared else teacher


def take_over_pipeline(module: ModuleType) -> None:
    """``swift.megatron.pipelines.train.rlhf``: old command lines are rewritten before parsing, our pipeline runs after it."""
    module.MegatronRLHF.args_class = module.MegatronRLHFArguments
    become_ours(module.MegatronRLHF, command_line, _pipeline)


def command_line(given: Any, args_class: type) -> Any:
    argv = modern_command_line(given, RENAMED, args_class)
    return argv if argv is given else _without_vllm_unless_asked_for(argv)  # another one: a command line for gkd


def _pipeline() -> type:
    from .pipeline import GKDPipeline

    return GKDPipeline


def _without_vllm_unless_asked_for(argv: list[str]) -> list[str]:
    """Stock turns vLLM on for every rlhf_type and then stops, because --vllm_mode has no default. 3.x had it off."""
    use_vllm = option_value(argv, '--use_vllm')
    if option_value(argv, '--vllm_mode') is not None or (use_vllm is not None and use_vllm.lower() in ('yes', 'true', 't', 'y', '1')):
        return argv
    if use_vllm is None:
        argv = [*argv, '--use_vllm', 'false']
    if option_value(argv, '--lmbda') is None:
        _warn('Neither --lmbda nor vLLM is asked for: --lmbda is 0, the student answers nothing.')
        argv += ['--lmbda', '0']
    return argv


def take_over_ray(module: ModuleType, enter: Callable[[], None]) -> dict[str, Any]:
    """``swift.ray.megatron.pipeline``: Ray places and starts our ranks; stock's loop has a loss and a teacher of its own.

    Args:
        enter: Activates the plugin in a worker.
    """
    cls = module.MegatronRayPipeline

    @for_gkd(cls, 'init')
    def start(self: Any, stock: Callable[[], None]) -> None:
        from .ray_driver import start

        start(self)

    @for_gkd(cls, 'train')
    def train(self: Any, stock: Callable[[], Any]) -> Any:
        from .ray_driver import train

        return train(self, enter)

    parse = module.parse_ray_yaml

    def parse_and_keep(path: str) -> Any:
        # Stock merges what is above the groups into each of them; ours have options that are not what they are there.
        config, groups, shared = parse(path)
        config.own_options = {name: {k: v for k, v in own.items() if v is not None} for name, own in groups.items()}
        return config, groups, shared

    return {'parse_ray_yaml': parse_and_keep}


def _warn(line: str) -> None:
    from swift.utils import get_logger

    get_logger().warning(line)


SEAMS = {
    'swift.megatron.arguments.rlhf_args': take_over_arguments,
    'swift.megatron.pipelines.train.rlhf': take_over_pipeline,
}
RAY = 'swift.ray.megatron.pipeline'
