"""Everything that the plugin changes in ms-swift for ``swift rlhf --rlhf_type gkd``, read and tested with ms-swift 4.6.0.

``SEAMS`` names the modules of ms-swift that are changed; ``activation.py`` calls each function once, right after its module was imported.
A function changes its module in place and returns the names that get a new value. Runs of another rlhf_type pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from types import ModuleType
from typing import Any, Literal, Optional

from ..arguments import OPTION_NAMES, check_values
from ..seams import (
    Renamed,
    allowed,
    become_ours,
    check_first,
    extended,
    fields_of,
    for_gkd,
    modern_command_line,
    option_fields,
    recognise_base,
    take_options,
)
from . import shared_base

# Options of ms-swift 2.x and 3.x that command lines for gkd still carry.
RENAMED = {
    '--train_type': Renamed('--tuner_type'),
    '--sft_type': Renamed('--tuner_type'),
    '--lora_target_modules': Renamed('--target_modules', {'ALL': 'all-linear'}),
}

# Options of RLHFArguments that stock GKDConfig lacks. TrainerFactory passes on only what both have, so that a GKD run lost them silently.
LOST_OPTIONS = (
    *('multi_turn_scheduler', 'max_turns', 'completion_length_limit_scope', 'vllm_server_pass_dataset', 'use_gym_env', 'gym_env'),
    *('epsilon', 'epsilon_high', 'delta', 'importance_sampling_level'),
)


def take_over_arguments(module: ModuleType) -> dict[str, Any]:
    """``swift.arguments.rlhf_args``: our options, checked before anything else happens; options that stock refuses or overrides."""
    cls = module.RLHFArguments

    check_first(cls, _check_options)
    recognise_base(cls, shared_base.recognise)

    @for_gkd(cls, '_check_gkd')
    def allow_more(self: Any, stock: Callable[[], None]) -> None:
        # Stock refuses seq_kd as not implemented, and a server without k. Its other checks hold.
        with allowed(self):
            stock()

    @for_gkd(cls, '_prepare_training_args')
    def pass_options_on(self: Any, stock: Callable[[dict], None], training_args: dict[str, Any]) -> None:
        # With --external_plugins our options are attributes, not fields, and asdict() left them out.
        stock(training_args)
        training_args.update({name: getattr(self, name) for name in OPTION_NAMES})

    padding_side = ('padding_side', Optional[Literal['left', 'right']], None)
    new = extended(cls, [*option_fields(), padding_side])
    stock_side, stock_init = cls.padding_side, cls._init_padding_side

    def _init_padding_side(self: Any) -> None:
        # Stock overwrites a --padding_side that the user gave to gkd. None stands for not given: then its defaults hold.
        given = self.padding_side
        self.padding_side = given or stock_side
        stock_init(self)
        if self.rlhf_type == 'gkd' and given:
            self.padding_side = given

    new._init_padding_side = _init_padding_side
    return {'RLHFArguments': new}


def _check_options(args: Any) -> None:
    take_options(args)
    check_values(args)


def take_over_config(module: ModuleType) -> dict[str, Any]:
    """``swift.rlhf_trainers.arguments``: the trainer's own arguments get our options and those that stock lost."""
    # disable_dropout: TRL's default of true sets --lora_dropout to 0 without a word.
    rewards = [('reward_funcs', list[str], field(default_factory=list)), ('reward_model', Optional[list[str]], None)]
    own = [('disable_dropout', bool, False), *rewards]
    fields = [*option_fields(), *fields_of(module.GRPOArgumentsMixin, LOST_OPTIONS), *own]
    return {'GKDConfig': extended(module.GKDConfig, fields)}


def take_over_trainer(module: ModuleType) -> None:
    """``swift.trainers.trainer_factory``: the trainer is looked up by a dotted name."""
    module.TrainerFactory.TRAINER_MAPPING['gkd'] = 'swift_gkd_plugin.hf.trainer.GKDTrainer'


def take_over_pipeline(module: ModuleType) -> None:
    """``swift.pipelines.train.rlhf``: old spellings before parsing, our pipeline after it."""
    module.SwiftRLHF.args_class = module.RLHFArguments
    become_ours(module.SwiftRLHF, command_line, _pipeline)


def command_line(given: Any, args_class: type) -> Any:
    return modern_command_line(given, RENAMED, args_class)


def _pipeline() -> type:
    from .pipeline import GKDPipeline

    return GKDPipeline


SEAMS = {
    'swift.arguments.rlhf_args': take_over_arguments,
    'swift.rlhf_trainers.arguments': take_over_config,
    'swift.trainers.trainer_factory': take_over_trainer,
    'swift.pipelines.train.rlhf': take_over_pipeline,
}
