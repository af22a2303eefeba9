"""Everything that the plugin changes in ms-swift for ``megatron rlhf --rlhf_type gkd``, read and tested with ms-swift 4.6.0.

``SEAMS`` works as in ``hf/host.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..arguments import check_values
from ..checks import teaches_as_base
from ..seams import Renamed, extended, for_gkd, forget_external_plugin, modern_command_line, option_fields, option_value, take_options
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

    @for_gkd(cls, '__post_init__')
    def check_first(self: Any, stock: Callable[[], None]) -> None:
        # Stock sets up torch.distributed before it knows whether the layout fits the ranks.
        _check_options(self)
        stock()

    @for_gkd(cls, '_init_model_kwargs')
    def check_again_after_plugins(self: Any, stock: Callable[[], None]) -> None:
        # See hf/host.py.
        stock()
        _check_options(self)
        forget_external_plugin(self)

    @for_gkd(cls, '_check_teacher')
    def recognise_shared_base(self: Any, stock: Callable[[], None]) -> None:
        # Stock compares two strings and ignores the revisions.
        teacher = self.teacher_model
        stock()
        with said_once():
            shared = teaches_as_base(self, teacher, self.tuner_type == 'lora')
        self._teacher_use_disable_adapter = shared
        self.teacher_model = None if shared else teacher

    @for_gkd(cls, '_check_teacher')
    def hide_seq_kd(self: Any, stock: Callable[[], None]) -> None:
        # Stock refuses it between this call and that of _init_generation_batch_params.
        stock()
        self._seq_kd, self.seq_kd = self.seq_kd, False

    @for_gkd(cls, '_init_generation_batch_params')
    def count_generation_batches(self: Any, stock: Callable[[], None]) -> None:
        self.seq_kd = self._seq_kd
        # Stock wants a row of every cycle for each rank. Ours share out what there is.
        self.generation_batch_size, self.steps_per_generation = self.resolve_generation_batch_size(
            self.generation_batch_size, self.steps_per_generation, self.global_batch_size, self.num_generations
        )
        self.per_device_generation_batch_size = -(-self.generation_batch_size // int(os.environ.get('WORLD_SIZE', 1)))

    @for_gkd(cls, 'init_iters')
    def count_every_row(self: Any, stock: Callable[..., None], train_dataset: Any, val_dataset: Any) -> None:
        # Stock drops what is left of an epoch and of the evaluation set. Ours is a shorter last step.
        evaluates = val_dataset is not None and self.eval_iters != 0
        stock(train_dataset, val_dataset)
        counts = Draw.of(self).epoch_length(len(train_dataset), self.num_train_epochs or 1), len(val_dataset or ())
        steps, eval_steps = (-(-count // self.global_batch_size) for count in counts)
        if self.num_train_epochs is not None:
            self.train_iters = steps * self.num_train_epochs
        if self.save_strategy == 'epoch':
            self.save_steps = self.eval_steps = steps
        self.eval_iters = eval_steps if evaluates else 0

    return {'MegatronRLHFArguments': extended(cls, option_fields())}


def _check_options(args: Any) -> None:
    with said_once():
        take_options(args)
        if args.lmbda > 0 and not args.use_vllm and args.gkd_on_missing_engine == 'dataset':
            _warn(f'--lmbda {args.lmbda} without vLLM: --gkd_on_missing_engine dataset trains on responses of the dataset instead.')
            args.lmbda = 0.0
        check_supported(args)  # first: some of check_values reads options that only `swift rlhf` has
        check_values(args)
        check_layout(args)


def take_over_pipeline(module: ModuleType) -> None:
    """``swift.megatron.pipelines.train.rlhf``: old command lines are rewritten before parsing, our pipeline runs after it."""
    cls = module.MegatronRLHF
    cls.args_class = module.MegatronRLHFArguments
    parse, set_seed = cls._parse_args, cls._set_seed

    def _parse_args(self: Any, args: Any = None) -> Any:
        argv = modern_command_line(args, RENAMED, self.args_class)
        if argv is not args:  # a command line for gkd
            argv = _without_vllm_unless_asked_for(argv)
        return parse(self, argv)

    def _set_seed(self: Any) -> None:
        # See hf/host.py.
        if self.args.rlhf_type == 'gkd' and type(self) is cls:
            from .pipeline import GKDPipeline

            self.__class__ = GKDPipeline
        set_seed(self)

    cls._parse_args, cls._set_seed = _parse_args, _set_seed


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


def _warn(line: str) -> None:
    from swift.utils import get_logger

    get_logger().warning(line)


SEAMS = {
    'swift.megatron.arguments.rlhf_args': take_over_arguments,
    'swift.megatron.pipelines.train.rlhf': take_over_pipeline,
}
