"""When the teacher lives on the student's base: one copy of the weights, the student's adapter off or the teacher's in its place.

Everything is decided from options and the configurations of adapters, before any weights load.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .. import checks
from ..arguments import OptionError
from ..checks import CHANGES_BASE, adapter_config, local

# PEFT's tuners whose layers can be switched off for a forward.
TUNERS = ('lora', 'adalora', 'vera', 'boft', 'fourierft', 'bone')


def recognise(args: Any, teacher: str | None) -> None:
    """Decide what ``--teacher_model``, ``--teacher_adapters`` and ``--gkd_self_teacher`` mean.

    Sets ``teacher_model`` (None if no other model loads), ``_teacher_use_disable_adapter`` and ``_adapter_on_base``, the directory of the
    adapter that the teacher has on the student's base, None if it has none.

    Args:
        teacher: ``--teacher_model`` as it was given.

    Raises:
        OptionError: The options contradict each other, or there is no frozen base to share.
    """
    own, adapters = args.gkd_self_teacher, args.teacher_adapters
    args._adapter_on_base = None
    teacher = checks.base_of_adapters(args, teacher, args.tuner_type in TUNERS)
    why = why_not_shared(args)
    if own == 'base' and why is not None:
        raise OptionError(f'--gkd_self_teacher base with {why}')
    checks.check_reference(args, why)
    shared = checks.teaches_as_base(args, teacher, why is None)
    if not shared and teacher is not None and args.tuner_type != 'full' and checks.same_weights(args, teacher):
        why = why or why_not_on_base(args, adapters)
        if why is None:
            shared, args._adapter_on_base = True, local(args, adapters[0])
        else:
            _log(f'--teacher_model {teacher} is the model of the student too, but a second copy of it is loaded: {why}')
    args._teacher_use_disable_adapter = shared
    args.teacher_model = None if shared else teacher


def why_not_shared(args: Any) -> str | None:
    """Why the student's adapter can't be switched off, or leaves something else than the base; None if it can."""
    start = _start(args)
    if args.tuner_type not in TUNERS:
        return f'--tuner_type {args.tuner_type}: there is no adapter to switch off; use lora.'
    if args.tuner_type == 'lora' and args.use_swift_lora:
        return "--use_swift_lora true: only PEFT's adapters can be switched off; leave it out."
    if args.tuner_type != 'lora':
        return None
    if start is None:
        bias, init = args.lora_bias, str(args.init_weights)
    else:
        config = adapter_config(local(args, start))
        bias, init = config.get('bias', 'none'), str(config.get('init_lora_weights'))
    if bias != 'none':
        return f'--lora_bias {bias}: the biases of the base are trained and would teach with it; use none.'
    if init.startswith(CHANGES_BASE):
        return f'--init_weights {init}: the base is not what it was once the adapter is in it; use true.'
    return None


def why_not_on_base(args: Any, adapters: list[str]) -> str | None:
    """Why the teacher's adapters can't be on the student's base beside its own; None if they can."""
    if len(adapters) > 1:
        return f"--teacher_adapters has {len(adapters)} adapters, one can be on the base beside the student's."
    path = local(args, adapters[0])
    config = adapter_config(path)
    kind = str(config.get('peft_type')).lower()
    if kind != args.tuner_type:
        return f'{path} is of the type {kind}, and the student of {args.tuner_type}.'
    if config.get('bias', 'none') != 'none' or str(config.get('init_lora_weights')).startswith(CHANGES_BASE):
        return f'{path} comes with changes of the base.'
    start = _start(args)
    mine = vars(args) if start is None else adapter_config(local(args, start))
    both = _saved_and_targeted(mine, config) | _saved_and_targeted(config, mine)
    if both:
        return (
            f"{path}: one of the two adapters trains {min(both)} as a whole and the other adds to it, which PEFT can't have in one model."
        )
    if set(config.get('target_parameters') or ()) != set(mine.get('target_parameters') or ()):
        return f"{path} has other --target_parameters than the student, which PEFT can't have in one model."
    if config.get('modules_to_save') and args.use_vllm:
        return f"{path} has modules_to_save, which ms-swift would send to vLLM as the student's."
    return None


def _start(args: Any) -> str | None:
    """The adapter that the student's training starts from; None for a fresh one."""
    return args.resume_from_checkpoint or (args.adapters[0] if args.adapters else None)


def _saved_and_targeted(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    """Modules that one adapter saves (``modules_to_save``) and another one targets."""
    saved, targets = set(one.get('modules_to_save') or ()), other.get('target_modules') or ()
    if isinstance(targets, str):
        return {name for name in saved if re.fullmatch(targets, name)}
    return saved & set(targets)


def _log(message: str) -> None:
    from swift.utils import get_logger

    get_logger().info(message)
