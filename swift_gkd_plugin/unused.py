"""Options of ms-swift and of ours that do nothing, or not what they say, in some configuration. It is said where they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from .arguments import engine_scores, has_rewards, learns_from_rewards
from .versions import untried

Entry = tuple[str, Callable[[Any], bool], str]  # name, when, why


def student_answers_all(args: Any) -> bool:
    return args.lmbda == 1


def teacher_is_silent(args: Any) -> bool:
    """Whether the teacher answers nothing."""
    return (not args.seq_kd or student_answers_all(args)) and args.gkd_eval_source != 'teacher'


def teacher_is_blind(args: Any) -> bool:
    """Whether the teacher looks at nothing."""
    return args.gkd_loss_weight == 0


def teacher_is_idle(args: Any) -> bool:
    return teacher_is_blind(args) and teacher_is_silent(args)


def asks_nobody(args: Any) -> bool:
    """Whether neither a teacher server nor an engine of the teacher's is asked."""
    return args.teacher_model_server is None and args.gkd_teacher_engine != 'vllm'


def nobody_generates(args: Any) -> bool:
    student = (args.lmbda > 0 or args.gkd_eval_source == 'student') and not args.use_vllm
    return not student and (teacher_is_silent(args) or args.teacher_model_server is not None or args.gkd_teacher_engine == 'vllm')


def learns_at_once(args: Any) -> bool:
    """Whether every response is learnt from by the student that gave it, in one update per generation."""
    training = getattr(args, 'training_args', None)  # of `swift rlhf`, which counts micro-batches
    if training is None:
        return getattr(args, 'steps_per_generation', None) == 1
    return training.steps_per_generation <= training.gradient_accumulation_steps


MEASURED = 'rewards are measured only: --gkd_rl_weight 0, or --lmbda 0'
OF_COMPARISON = ('scale_rewards', 'advantage_estimator', 'gkd_rl_schedule', 'gkd_rl_switch')
OF_RATIOS = ('epsilon', 'epsilon_high', 'delta', 'importance_sampling_level')
OF_REWARDS = ('reward_weights', 'gkd_rl_weight', 'gkd_passing_reward', *OF_COMPARISON)
OF_MODELS = ('reward_model_type', 'reward_model_revision', 'reward_model_plugin', 'reward_template', 'reward_adapters')
BLIND = 'at --gkd_loss_weight 0 no teacher looks at the responses'
IDLE = f'{BLIND}, and without --seq_kd or --gkd_eval_source teacher it answers nothing'
ELSEWHERE = 'it belongs to --teacher_model_server and --gkd_teacher_engine vllm'
ONLY_IN_ENGINE = 'the engine has the only copy of the teacher; see --gkd_teacher_engine_args'

# Options of ms-swift's other algorithms, which its parser takes with every --rlhf_type and stock GKD drops without a word.
OF_OTHERS: dict[str, tuple[str, ...]] = {
    'GRPO': (
        *('overlong_filter', 'dynamic_sample'),
        *('advantage_reweight', 'kl_in_reward'),
        *('num_iterations', 'num_generations_eval', 'teacher_kl_coef', 'sdar_loss_coef', 'top_entropy_quantile', 'log_entropy'),
        *('rollout_importance_sampling_mode', 'log_rollout_offpolicy_metrics', 'off_policy_sequence_mask_delta', 'sync_ref_model'),
        *('chord_sft_dataset', 'chord_enable_phi_function'),
    ),
    'PPO': (
        *('num_ppo_epochs', 'kl_coef', 'vf_coef', 'cliprange', 'cliprange_value', 'gamma', 'lam', 'whiten_rewards', 'num_mini_batches'),
        'missing_eos_penalty',
    ),
    'DPO and its relatives': (
        *('ref_model', 'ref_adapters', 'mcore_ref_model', 'mcore_ref_adapter', 'reference_free', 'f_divergence_type', 'label_smoothing'),
        *('rpo_alpha', 'ld_alpha', 'loss_weights', 'cpo_alpha', 'simpo_gamma', 'desirable_weight', 'undesirable_weight', 'calculate_KL'),
        'center_rewards_coefficient',
    ),
}

# The first reason of an option is said. With both back ends; each has a table of its own beside it.
NOT_USED: tuple[Entry, ...] = (
    ('packing', lambda a: True, 'responses change with every step, so rows are not packed beforehand; it works as --padding_free'),
    ('group_by_length', lambda a: True, 'the length of a response is not known before it is generated; rows come in random order'),
    ('cached_dataset', lambda a: True, 'rows are encoded again, their cached lengths are not used'),
    ('cached_val_dataset', lambda a: True, 'rows are encoded again, their cached lengths are not used'),
    ('teacher_model', teacher_is_idle, IDLE),
    ('teacher_model_server', teacher_is_idle, IDLE),
    ('gkd_self_teacher', teacher_is_idle, IDLE),
    ('seq_kd', student_answers_all, 'at --lmbda 1 the student answers every row'),
    # ms-swift puts a number in the place of a --beta that is not given.
    ('beta', lambda a: teacher_is_blind(a) and a.beta != 0.5, 'at --gkd_loss_weight 0 there is no divergence'),
    *(
        (name, teacher_is_blind, 'at --gkd_loss_weight 0 there is no divergence')
        for name in ('gkd_divergence', 'gkd_skew', 'gkd_temperature', 'gkd_temperature_squared')
    ),
    ('beta', lambda a: a.gkd_divergence != 'jsd' and a.beta != 0.5, 'it belongs to --gkd_divergence jsd'),
    ('gkd_skew', lambda a: 'skew' not in a.gkd_divergence, 'it belongs to the skewed divergences'),
    ('gkd_tail', lambda a: a.gkd_logits_topk is None, 'it belongs to --gkd_logits_topk'),
    ('gkd_tail', teacher_is_blind, BLIND),
    ('gkd_logits_topk', teacher_is_blind, BLIND),
    ('gkd_eval_temperature', lambda a: a.gkd_eval_source == 'dataset', 'evaluation scores responses of the dataset; see --gkd_eval_source'),
    ('gkd_teacher_temperature', teacher_is_silent, 'the teacher answers with --seq_kd or --gkd_eval_source teacher'),
    ('gkd_teacher_max_completion_length', teacher_is_silent, 'the teacher answers with --seq_kd or --gkd_eval_source teacher'),
    (
        'gkd_teacher_engine',
        lambda a: teacher_is_silent(a) and (not engine_scores(a) or teacher_is_blind(a)),
        'it answers with --seq_kd, and scores with --gkd_logits_topk',
    ),
    ('gkd_teacher_engine_args', lambda a: a.gkd_teacher_engine != 'vllm', 'it belongs to --gkd_teacher_engine vllm'),
    ('gkd_save_teacher_responses', lambda a: not a.seq_kd, 'the teacher answers with --seq_kd'),
    ('gkd_save_teacher_responses', student_answers_all, 'at --lmbda 1 the student answers every row'),
    ('gkd_teacher_batch_size', lambda a: a.teacher_model is None, 'the teacher is the student itself, or elsewhere'),
    ('gkd_teacher_batch_size', teacher_is_blind, BLIND),
    (
        'gkd_teacher_batch_size',
        lambda a: a.gkd_routing == 'teacher',
        'with --gkd_routing teacher it looks at each micro-batch of the student',
    ),
    ('gkd_routing', teacher_is_blind, BLIND),
    ('gkd_teacher_batch_size', engine_scores, 'the engine looks at the responses; see --gkd_server_in_flight'),
    ('gkd_generation_tokens', nobody_generates, 'nobody generates in the training processes'),
    ('gkd_prefetch', lambda a: a.lmbda == 0, 'at --lmbda 0 the student answers nothing'),
    ('gkd_num_samples', lambda a: a.lmbda == 0 and not a.seq_kd, 'a response of the dataset is there once'),
    ('offload_teacher_model', lambda a: a.teacher_model is None, 'the teacher is the student itself and stays where it is'),
    ('gkd_teacher_offload', lambda a: a.teacher_model is None, 'the teacher is the student itself and stays where it is'),
    ('gkd_ema_decay', lambda a: a.gkd_self_teacher != 'ema', 'it belongs to --gkd_self_teacher ema'),
    ('teacher_tag_key', lambda a: a.teacher_model_server is None, 'it routes samples to teacher servers'),
    ('gkd_server_timeout', asks_nobody, ELSEWHERE),
    ('gkd_server_retry_seconds', asks_nobody, ELSEWHERE),
    ('gkd_server_in_flight', asks_nobody, ELSEWHERE),
    ('gkd_rl_switch', lambda a: has_rewards(a) and a.gkd_rl_schedule != 'switch', 'it belongs to --gkd_rl_schedule switch'),
    (
        'gkd_passing_reward',
        lambda a: has_rewards(a) and a.gkd_on == 'all' and a.gkd_feedback is None,
        'it belongs to --gkd_on failed or passed, and to --gkd_feedback',
    ),
    ('gkd_on', lambda a: has_rewards(a) and teacher_is_blind(a), BLIND),
    *((name, lambda a: has_rewards(a) and not learns_from_rewards(a), MEASURED) for name in OF_COMPARISON),
    *((name, lambda a: has_rewards(a) and not learns_from_rewards(a) and a.gkd_signal != 'sampled', MEASURED) for name in OF_RATIOS),
    *(
        (name, lambda a: 'soft_overlong' not in a.reward_funcs, 'it belongs to --reward_funcs soft_overlong')
        for name in ('soft_max_length', 'soft_cache_length')
    ),
    *((name, lambda a: not has_rewards(a), 'it belongs to --reward_funcs and --reward_model') for name in OF_REWARDS),
    *(
        (name, lambda a: not has_rewards(a) and a.gkd_signal != 'sampled', 'it belongs to rewards and to --gkd_signal sampled')
        for name in OF_RATIOS
    ),
    *((name, lambda a: not a.reward_model, 'it belongs to --reward_model') for name in OF_MODELS),
    *((name, learns_at_once, 'with one update per generation all ratios are 1; see --steps_per_generation') for name in OF_RATIOS),
    ('loss_type', lambda a: True, '--gkd_divergence chooses the loss'),
    ('enable_dft_loss', lambda a: True, 'it belongs to SFT'),
    ('enable_channel_loss', lambda a: True, 'it belongs to SFT'),
    *((name, lambda a: True, f'it belongs to {others}') for others, names in OF_OTHERS.items() for name in names),
)


def say_unused(args: Any, own: tuple[Entry, ...]) -> None:
    """Warn of every option that was given in vain, and of packages in versions that were not tried.

    Args:
        own: Entries of the back end.
    """
    from swift.utils import get_logger

    for line in (*untried(), *unused(args, own)):
        get_logger().warning(line)


def unused(args: Any, own: tuple[Entry, ...]) -> list[str]:
    """A line for each option that was given in vain."""
    default, lines = {f.name: f.default for f in fields(args) if f.default is not MISSING}, {}
    for name, applies, why in (*NOT_USED, *own):
        value = getattr(args, name, None)
        if name not in lines and value not in (None, [], default.get(name)) and applies(args):
            shown = '' if isinstance(value, dict) else f' {value}'
            lines[name] = f'--{name}{shown} is not used as such: {why}.'
    return list(lines.values())
