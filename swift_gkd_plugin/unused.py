"""Options of ms-swift and of ours that do nothing, or not what they say, in some configuration. It is said where they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

Entry = tuple[str, Callable[[Any], bool], str]  # name, when, why


def teacher_is_silent(args: Any) -> bool:
    return not args.seq_kd and args.gkd_eval_source != 'teacher'


def nobody_generates(args: Any) -> bool:
    student = (args.lmbda > 0 or args.gkd_eval_source == 'student') and not args.use_vllm
    return not student and (teacher_is_silent(args) or args.teacher_model_server is not None or args.gkd_teacher_engine == 'vllm')


# With both back ends; each has a table of its own beside it.
NOT_USED: tuple[Entry, ...] = (
    ('packing', lambda a: True, 'responses change with every step, so rows are not packed beforehand; it works as --padding_free'),
    ('group_by_length', lambda a: True, 'the length of a response is not known before it is generated; rows come in random order'),
    ('cached_dataset', lambda a: True, 'rows are encoded again, their cached lengths are not used'),
    ('cached_val_dataset', lambda a: True, 'rows are encoded again, their cached lengths are not used'),
    ('beta', lambda a: a.gkd_divergence != 'jsd' and a.beta != 0.5, 'it belongs to --gkd_divergence jsd'),
    ('gkd_skew', lambda a: 'skew' not in a.gkd_divergence, 'it belongs to the skewed divergences'),
    ('gkd_tail', lambda a: a.gkd_logits_topk is None, 'it belongs to --gkd_logits_topk'),
    ('gkd_logits_topk', lambda a: a.gkd_loss_weight == 0, 'at --gkd_loss_weight 0 no teacher looks at the responses'),
    ('gkd_teacher_temperature', teacher_is_silent, 'the teacher answers with --seq_kd or --gkd_eval_source teacher'),
    ('gkd_teacher_max_completion_length', teacher_is_silent, 'the teacher answers with --seq_kd or --gkd_eval_source teacher'),
    ('gkd_teacher_engine_args', lambda a: a.gkd_teacher_engine != 'vllm', 'it belongs to --gkd_teacher_engine vllm'),
    ('gkd_save_teacher_responses', lambda a: not a.seq_kd, 'the teacher answers with --seq_kd'),
    ('gkd_teacher_batch_size', lambda a: a.teacher_model is None, 'the teacher is the student itself, or elsewhere'),
    ('gkd_generation_tokens', nobody_generates, 'nobody generates in the training processes'),
    ('gkd_prefetch', lambda a: a.lmbda == 0, 'at --lmbda 0 the student answers nothing'),
    ('gkd_num_samples', lambda a: a.lmbda == 0 and not a.seq_kd, 'a response of the dataset is there once'),
    ('offload_teacher_model', lambda a: a.teacher_model is None, 'the teacher is the student itself and stays where it is'),
    ('gkd_teacher_offload', lambda a: a.teacher_model is None, 'the teacher is the student itself and stays where it is'),
    ('gkd_ema_decay', lambda a: a.gkd_self_teacher != 'ema', 'it belongs to --gkd_self_teacher ema'),
    ('teacher_tag_key', lambda a: a.teacher_model_server is None, 'it routes samples to teacher servers'),
    ('gkd_server_timeout', lambda a: a.teacher_model_server is None, 'it belongs to --teacher_model_server'),
    ('gkd_server_retry_seconds', lambda a: a.teacher_model_server is None, 'it belongs to --teacher_model_server'),
    ('gkd_server_in_flight', lambda a: a.teacher_model_server is None, 'it belongs to --teacher_model_server'),
    ('loss_type', lambda a: True, '--gkd_divergence chooses the loss'),
    ('enable_dft_loss', lambda a: True, 'it belongs to SFT'),
    ('enable_channel_loss', lambda a: True, 'it belongs to SFT'),
)


def say_unused(args: Any, own: tuple[Entry, ...]) -> None:
    """Warn of every option that was given in vain.

    Args:
        own: Entries of the back end.
    """
    from swift.utils import get_logger

    default = {f.name: f.default for f in fields(args) if f.default is not MISSING}
    for name, applies, why in (*NOT_USED, *own):
        value = getattr(args, name, None)
        if value not in (None, [], default.get(name)) and applies(args):
            shown = '' if isinstance(value, dict) else f' {value}'
            get_logger().warning(f'--{name}{shown} is not used as such: {why}.')
