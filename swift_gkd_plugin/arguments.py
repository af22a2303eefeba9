"""Every option that the plugin adds to ``--rlhf_type gkd``: its default, range and help text, once, for both back ends.

Options that ms-swift already has (``--lmbda``, ``--beta``, ``--temperature``, ``--seq_kd``, ``--sft_alpha``, ``--gkd_logits_topk``,
``--teacher_*``, ``--steps_per_generation``, …) keep their names and meaning and are checked here too.

Nothing heavy is imported: the start-up hook reads this file before torch or ms-swift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Optional

DIVERGENCES = ('jsd', 'forward_kl', 'reverse_kl', 'skew_forward_kl', 'skew_reverse_kl', 'tvd')
SOURCES = ('dataset', 'student', 'teacher')
SIGNALS = ('distribution', 'sampled')
RL_SCHEDULES = ('constant', 'linear', 'switch')
DISTILLED = ('all', 'failed', 'passed')
# transformers' quantisers that ms-swift knows, and the bits that each takes.
QUANTISERS = {'bnb': (4, 8), 'hqq': (1, 2, 3, 4, 8), 'eetq': (8,), 'quanto': (2, 4, 8, 'float8'), 'fp8': (None,)}


class OptionError(ValueError):
    """A command line that can't be carried out. The message is one line: the option, its value, what is allowed, what to do."""


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={'help': help})


@dataclass
class GKDOptions:
    """The plugin's own options. Each is a field of ms-swift's argument classes as well (see ``hf/host.py``)."""

    gkd_source_per: Literal['sample', 'batch'] = option(
        'sample',
        'Draw the source of the responses (student, teacher, dataset) for each sample, or once for a whole '
        'generation batch as ms-swift does.',
    )
    gkd_divergence: Literal[DIVERGENCES] = option(
        'jsd',
        'The divergence D(teacher, student). jsd is the generalised Jensen-Shannon divergence of --beta: beta=0 is '
        'forward KL(teacher||student), beta=1 is reverse KL(student||teacher).',
    )
    gkd_skew: float = option(
        0.1, 'Share of the other model in the mixture of skew_forward_kl and skew_reverse_kl (DistiLLM), in [1e-6, 1).'
    )
    gkd_signal: Literal[SIGNALS] = option(
        'distribution',
        "What the loss knows of the teacher: its distribution at each token, or (sampled) only its log-probability of the student's own "
        'token, from which the reverse KL is estimated as a policy gradient; for servers that send no more than that.',
    )
    gkd_loss_weight: float = option(
        1.0,
        'Weight of the divergence in the loss, >= 0. At 0 no teacher forward runs: with --sft_alpha and --seq_kd '
        'this is SeqKD as plain cross-entropy.',
    )
    gkd_extrapolation: float = option(
        1.0,
        "The teacher P is replaced by P^x · R^(1-x), normalised, with R the student's base without its adapter: beyond the teacher above 1 "
        '(reward extrapolation, G-OPD), on the way to it below, the teacher itself at 1; > 0.',
    )
    gkd_temperature: Optional[float] = option(
        None,
        'Temperature that softens both distributions in the divergence, > 0. Default: --temperature, which then '
        'serves sampling and loss alike, as in ms-swift.',
    )
    gkd_temperature_squared: bool = option(
        False,
        'Multiply the divergence by the square of its temperature (Hinton et al., 2015), so that the size of the '
        'gradient does not depend on the temperature.',
    )
    gkd_tail: Literal['bucket', 'renormalize'] = option(
        'bucket',
        'With --gkd_logits_topk: compare k ids and one bucket with the remaining mass of each side, or '
        'renormalise both sides over the k ids as ms-swift does.',
    )
    gkd_prefetch: bool = option(
        False,
        "With --use_vllm true --vllm_mode server: the next step's responses are generated while this step trains, from weights that are "
        'one update older.',
    )
    gkd_num_samples: int = option(
        1,
        'Responses per prompt that the student or the teacher answers, each with a seed of its own, > 0. Every response takes the place of '
        'a row in the batch; a response of the dataset is there once. With --gkd_source_per batch its repeats are dropped after the rows '
        'have been shared out and leave micro-batches that count nothing.',
    )
    gkd_generation_tokens: Optional[int] = option(
        None,
        'Tokens (prompt and longest possible answer, summed over rows) that a rank keeps keys and values of at once while it generates '
        'without an engine, > 0; prompts that do not fit wait for their turn. Default: 8 GiB of the model that answers.',
    )
    gkd_on_missing_engine: Literal['generate', 'dataset'] = option(
        'generate',
        'What --lmbda above 0 means in `megatron rlhf` without vLLM: the student generates in the training processes, or (dataset) '
        'responses of the dataset stand in with a warning, as in ms-swift.',
    )
    gkd_eval_source: Literal[SOURCES] = option(
        'dataset',
        'Responses that the evaluation scores: those of the validation set, or ones that the student or '
        'the teacher generates with fixed seeds.',
    )
    gkd_eval_temperature: Optional[float] = option(
        None, 'Sampling temperature of the responses that an evaluation generates, >= 0 (0: greedy). Default: that of training.'
    )
    gkd_teacher_system: Optional[str] = option(
        None, "System prompt of the teacher, when it answers and when it scores. Default: the student's."
    )
    gkd_teacher_enable_thinking: Optional[bool] = option(
        None, "Thinking mode of the teacher's prompt, for templates that have one. Default: the student's."
    )
    gkd_teacher_temperature: Optional[float] = option(
        None, 'Sampling temperature of the teacher with --seq_kd, >= 0 (0: greedy). Default: --temperature.'
    )
    gkd_teacher_max_completion_length: Optional[int] = option(
        None, 'Limit of the answers of the teacher in tokens, > 0. Default: --max_completion_length.'
    )
    gkd_teacher_engine: Literal['transformers', 'vllm'] = option(
        'transformers',
        'What a local --teacher_model answers with (--seq_kd). vllm: an engine beside each rank, asleep outside its turn; with '
        '--gkd_logits_topk it scores too and no other copy of the teacher is loaded.',
    )
    gkd_teacher_engine_args: str = option(
        '', "More of the teacher engine's command line, in vLLM's spelling, say '--max-model-len 4096 --gpu-memory-utilization 0.4'."
    )
    gkd_self_teacher: Optional[Literal['base', 'live', 'ema']] = option(
        None,
        "Without --teacher_model: the teacher is the student's base with its adapter off, the student as it is at this step (the default), "
        'or the exponential moving average of the student, which costs one more copy of what is trained.',
    )
    gkd_ema_decay: float = option(
        0.999, 'With --gkd_self_teacher ema: share of the average that an optimizer step keeps, in [0, 1]. 1 keeps the start.'
    )
    gkd_routing: Literal['own', 'teacher'] = option(
        'own',
        'Models with routed experts: each chooses its own experts, or (teacher) the student is trained with the experts that the teacher '
        'chose for the same tokens, weighted by its own router.',
    )
    gkd_teacher_offload: Optional[Literal['model', 'layer']] = option(
        None,
        'Keep a separate --teacher_model on the host. model, the same as --offload_teacher_model true: it comes to the device once per '
        'optimizer step. layer: two of its layers at a time, for every micro-batch.',
    )
    gkd_optimizer_offload: Optional[bool] = option(
        None,
        "megatron rlhf: the optimizer's state is on the host while a --teacher_model that lives there (--gkd_teacher_offload model) is on "
        'the device. Default: if the memory that is foretold of the run says that the device cannot hold both.',
    )
    teacher_quant_method: Optional[Literal[('none', *QUANTISERS)]] = option(
        None,
        "Quantise a separate --teacher_model while it loads, by transformers' own quantiser of this name; none leaves it as it is. "
        'Default: --quant_method, which ms-swift applies to both models. A checkpoint that is quantised already just loads.',
    )
    teacher_quant_bits: Optional[Literal[1, 2, 3, 4, 8, 'float8']] = option(
        None, 'Bits of --teacher_quant_method: bnb 4 or 8, hqq 1, 2, 3, 4 or 8, quanto 2, 4, 8 or float8, eetq 8; fp8 has none.'
    )
    teacher_device_map: Optional[str] = option(
        None,
        'Where the parts of a separate --teacher_model live: auto, sequential, balanced, a device, or a JSON map of modules to devices, '
        'cpu and disk. Default: --device_map.',
    )
    teacher_max_memory: Optional[str] = option(
        None, 'With --teacher_device_map auto: what the teacher may take of each device, \'{0: "20GB", "cpu": "100GB"}\'.'
    )
    gkd_teacher_batch_size: Optional[int] = option(
        None,
        'Rows that a separate --teacher_model looks at together, > 0. They are taken from all micro-batches of the step, sorted by length. '
        'Default: as many as have 4096 tokens together (16384 if its weights are gathered or brought to the device for it), or twice as '
        "many as the student's largest micro-batch.",
    )
    gkd_micro_batch_tokens: Optional[int] = option(
        None,
        "megatron rlhf: tokens of a micro-batch of the student's, padding included, > 0; a longer row is alone. A step has as many "
        'micro-batches as that takes, the same number on all ranks. Default: --micro_batch_size decides how many.',
    )
    gkd_save_teacher_responses: Optional[str] = option(
        None,
        'With --seq_kd: append what the teacher answers to this JSONL file, a dataset for later runs '
        '(--dataset FILE --lmbda 0 --seq_kd false).',
    )
    gkd_server_timeout: float = option(600.0, 'Seconds that one request to a --teacher_model_server may take, > 0.')
    gkd_server_retry_seconds: float = option(
        600.0,
        'How long requests to a --teacher_model_server that fail (no connection, timeout, HTTP 5xx) are tried again, with growing '
        'pauses, >= 0; then a checkpoint is written and the run ends.',
    )
    gkd_server_in_flight: int = option(16, 'Requests to each --teacher_model_server that a rank has in flight, > 0.')
    teacher_tensor_model_parallel_size: Optional[int] = option(
        None, "megatron rlhf: ranks that each layer of a separate --teacher_model is split over. Default: the student's."
    )
    teacher_pipeline_model_parallel_size: Optional[int] = option(
        None, "megatron rlhf: stages that the layers of a separate --teacher_model are dealt out to. Default: the student's."
    )
    teacher_context_parallel_size: Optional[int] = option(
        None, "megatron rlhf: ranks that a separate --teacher_model splits a sequence over. Default: the student's."
    )
    teacher_expert_model_parallel_size: Optional[int] = option(
        None, "megatron rlhf: ranks that the experts of a separate --teacher_model are dealt out to. Default: the student's."
    )
    teacher_expert_tensor_parallel_size: Optional[int] = option(
        None, "megatron rlhf: ranks that each expert of a separate --teacher_model is split over. Default: the student's."
    )
    gkd_rl_weight: float = option(
        1.0,
        'Weight of the rewards (--reward_funcs, --reward_model) in the loss, >= 0: of -advantage * log S(token) on responses of the '
        'student, at --temperature. 0: rewards are measured only.',
    )
    gkd_rl_schedule: Literal[RL_SCHEDULES] = option(
        'constant',
        'How the weights of divergence and rewards change over the run. linear: the one falls to 0 while the other rises from 0; switch: '
        'the divergence alone up to --gkd_rl_switch of the run, then the rewards alone, without a teacher forward.',
    )
    gkd_rl_switch: float = option(0.5, 'With --gkd_rl_schedule switch: the share of the run that distils, in (0, 1).')
    gkd_on: Literal[DISTILLED] = option(
        'all',
        'Which responses of the student are compared with the teacher: all of them, or those whose reward is below --gkd_passing_reward '
        '(failed) or not (passed).',
    )
    gkd_passing_reward: float = option(
        1.0, 'With --gkd_on failed or passed, and for --gkd_feedback: the weighted sum of the rewards from which a response has passed.'
    )
    gkd_feedback: Optional[str] = option(
        None,
        'What the teacher reads in place of the last question when it looks at a response of the student, as with the column '
        'teacher_prompt, but made of the rewards: sibling (the question, and the best other response to it, if that has passed), or what a '
        'file of --external_plugins puts under this name into swift_gkd_plugin.feedback.feedbacks.',
    )
    gkd_detailed_metrics: bool = option(
        False, 'Log forward and reverse KL, entropies and agreement of the two models as well; about 5 % more work per step.'
    )


OPTION_NAMES = tuple(f.name for f in fields(GKDOptions))


def teacher_offload(args: Any) -> Optional[str]:
    """How a separate teacher is kept on the host: ``model``, ``layer`` or not (None)."""
    return args.gkd_teacher_offload or ('model' if args.offload_teacher_model else None)


def engine_scores(args: Any) -> bool:
    """Whether a vLLM engine of the teacher's sends log-probabilities, so that nothing else needs its weights for them."""
    return args.gkd_teacher_engine == 'vllm' and (args.gkd_logits_topk is not None or args.gkd_signal == 'sampled')


def has_rewards(args: Any) -> bool:
    """Whether functions or models say what responses are worth."""
    return bool(args.reward_funcs or args.reward_model)


def learns_from_rewards(args: Any) -> bool:
    """Whether rewards are in the loss, not only measured."""
    return has_rewards(args) and args.gkd_rl_weight > 0 and args.lmbda > 0


def extrapolates(args: Any) -> bool:
    """Whether the student's base is looked at beside the teacher."""
    return args.gkd_extrapolation != 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise OptionError(message)


def _check_sampled(args: Any) -> None:
    if args.gkd_signal != 'sampled':
        return
    beta = 0.5 if args.beta is None else args.beta
    divergence = f'{args.gkd_divergence} of --beta {beta}' if args.gkd_divergence == 'jsd' else args.gkd_divergence
    _require(
        args.gkd_divergence == 'reverse_kl' or (args.gkd_divergence == 'jsd' and beta == 1),
        f'--gkd_signal sampled with --gkd_divergence {divergence}: a token that the student has sampled tells the reverse KL only; add '
        '--gkd_divergence reverse_kl.',
    )
    _require(args.gkd_loss_weight > 0, f'--gkd_signal sampled with --gkd_loss_weight {args.gkd_loss_weight}: there is no divergence.')
    _require(
        args.lmbda == 1 or (args.lmbda > 0 and args.sft_alpha > 0),
        f"--gkd_signal sampled with --lmbda {args.lmbda} and --sft_alpha {args.sft_alpha}: responses that are not the student's would have "
        'no loss; set --lmbda 1, or --sft_alpha > 0 for those.',
    )
    _require(
        args.gkd_logits_topk is None,
        f'--gkd_signal sampled and --gkd_logits_topk {args.gkd_logits_topk}: the teacher is asked about one token, or about the k '
        'likeliest; leave one of them out.',
    )
    _require(
        args.gkd_routing == 'own',
        f'--gkd_signal sampled with --gkd_routing {args.gkd_routing}: the student that samples chooses its own experts, and its '
        'log-probabilities would be of another; leave one of them out.',
    )
    elsewhere = args.teacher_model_server is not None or args.gkd_teacher_engine == 'vllm'
    wanted = 1.0 if elsewhere else args.temperature
    found = args.temperature if args.gkd_temperature is None else args.gkd_temperature
    _require(
        found == wanted == args.temperature > 0,
        f'--gkd_signal sampled with --gkd_temperature {found} and --temperature {args.temperature}: '
        + (
            "a server's log-probabilities are taken at 1, and the student's would be another distribution's; set --temperature 1."
            if elsewhere
            else 'tokens say something about the temperature that they were sampled at; leave --gkd_temperature out, and --temperature > 0.'
        ),
    )
    _require(
        args.importance_sampling_level != 'sequence',
        '--gkd_signal sampled with --importance_sampling_level sequence: each token has a weight of its own; use sequence_token.',
    )


def _check_ratios(args: Any) -> None:
    for name in ('epsilon', 'epsilon_high'):
        bound = getattr(args, name)
        _require(bound is None or bound >= 0, f'--{name} {bound}: must be >= 0, how far a ratio of probabilities may be from 1.')
    _require(args.delta is None or args.delta > 0, f'--delta {args.delta}: must be > 0, the most that a ratio of probabilities counts for.')


def _check_rewards(args: Any) -> None:
    weight, models = args.gkd_rl_weight, args.reward_model or []
    rewards = f'--reward_funcs {" ".join(args.reward_funcs)}' if args.reward_funcs else f'--reward_model {" ".join(models)}'
    _require(
        0 <= weight < math.inf, f'--gkd_rl_weight {weight}: must be >= 0 and finite (the weight of the rewards; 0 measures them only).'
    )
    weights = args.reward_weights or []
    _require(all(map(math.isfinite, weights)), f'--reward_weights {" ".join(map(str, weights))}: each must be a finite number.')
    _require(math.isfinite(args.gkd_passing_reward), f'--gkd_passing_reward {args.gkd_passing_reward}: must be a finite number.')
    for name in ('reward_model_type', 'reward_model_revision', 'reward_template', 'reward_model_plugin'):
        given = len(getattr(args, name, None) or models)  # `megatron rlhf`, which has no reward models, lacks some
        _require(given == len(models) or not models, f'--{name} has {given} values for {len(models)} of --reward_model; give one for each.')
    best = getattr(args, 'metric_for_best_model', None) or ''
    _require(
        not best.removeprefix('eval_').startswith('reward') or (has_rewards(args) and args.gkd_eval_source == 'student'),
        f'--metric_for_best_model {best}: evaluations have no rewards; add --reward_funcs or --reward_model and --gkd_eval_source student.',
    )
    if not has_rewards(args):
        _require(
            args.gkd_on == 'all',
            f'--gkd_on {args.gkd_on} without --reward_funcs or --reward_model: nothing says which responses have passed.',
        )
        _require(
            args.gkd_feedback is None,
            f'--gkd_feedback {args.gkd_feedback} without --reward_funcs or --reward_model: it is made of rewards; add one of them.',
        )
        return
    _check_feedback(args)
    _require(0 < args.gkd_rl_switch < 1, f'--gkd_rl_switch {args.gkd_rl_switch}: must be in (0, 1), a share of the run.')
    _require(
        args.gkd_rl_schedule == 'constant' or (weight > 0 and args.gkd_loss_weight > 0),
        f'--gkd_rl_schedule {args.gkd_rl_schedule} with --gkd_loss_weight {args.gkd_loss_weight} and --gkd_rl_weight {weight}: it goes '
        'from the one to the other; both must be > 0.',
    )
    _require(
        args.lmbda > 0 or args.gkd_eval_source == 'student',
        f'{rewards} with --lmbda 0: rewards are for responses of the student, and it gives none; raise --lmbda, or '
        'measure them with --gkd_eval_source student.',
    )
    if not learns_from_rewards(args):
        return
    _require(
        args.gkd_routing == 'own',
        f'{rewards} with --gkd_routing {args.gkd_routing}: the student that samples chooses its own experts, and its '
        'log-probabilities would be of another; leave one of them out.',
    )
    _require(
        args.gkd_loss_weight > 0 or args.sft_alpha > 0 or args.lmbda == 1,
        f'{rewards} with --gkd_loss_weight 0, --sft_alpha 0 and --lmbda {args.lmbda}: responses that are not the '
        "student's would have no loss; set --lmbda 1.",
    )
    _require(
        args.gkd_num_samples > 1,
        f'{rewards} with --gkd_num_samples {args.gkd_num_samples}: a response is compared with others to the same prompt; '
        'give 2 or more, or --gkd_rl_weight 0 to measure rewards only.',
    )
    _require(
        args.temperature > 0,
        f'{rewards} with --temperature {args.temperature}: all responses to a prompt would be the same; raise it.',
    )


def _check_feedback(args: Any) -> None:
    name = args.gkd_feedback
    if name is None:
        return
    _require(
        args.gkd_loss_weight > 0,
        f'--gkd_feedback {name} with --gkd_loss_weight 0: no teacher looks at the responses; leave one of them out.',
    )
    _require(args.lmbda > 0, f'--gkd_feedback {name} with --lmbda 0: it is for responses of the student, and it gives none; raise --lmbda.')
    _require(
        name != 'sibling' or (args.gkd_num_samples > 1 and args.temperature > 0),
        f'--gkd_feedback {name} with --gkd_num_samples {args.gkd_num_samples} and --temperature {args.temperature}: there is no other '
        'response to the same prompt; give 2 or more, and a temperature above 0.',
    )


def _check_extrapolation(args: Any) -> None:
    given = f'--gkd_extrapolation {args.gkd_extrapolation}'
    _require(0 < args.gkd_extrapolation < math.inf, f'{given}: must be > 0 and finite; 1 is the plain teacher.')
    if not extrapolates(args):
        return
    _require(args.gkd_loss_weight > 0, f'{given} with --gkd_loss_weight 0: there is no divergence; leave it out.')
    _require(
        args.teacher_model_server is None,
        f'{given} and --teacher_model_server {args.teacher_model_server}: a server sends no whole distribution; give a local teacher.',
    )
    _require(
        args.gkd_logits_topk is None,
        f'{given} with --gkd_logits_topk {args.gkd_logits_topk}: the logits of all ids are needed; leave one of them out.',
    )
    _require(
        args.gkd_signal == 'distribution',
        f'{given} with --gkd_signal {args.gkd_signal}: the logits of all ids are needed; leave one of them out.',
    )
    _require(
        args.gkd_routing == 'own',
        f'{given} with --gkd_routing {args.gkd_routing}: the base would choose other experts than the student, and differ from it by them; '
        'leave one of them out.',
    )


def check_values(args: Any) -> None:
    """Check every number and combination that needs nothing but the command line. Runs before the first network call.

    Args:
        args: ms-swift's argument object (``RLHFArguments`` or ``MegatronRLHFArguments``) with the fields of :class:`GKDOptions`.

    Raises:
        OptionError: One line that names the option, its value, what is allowed and what to do.
    """
    beta = 0.5 if args.beta is None else args.beta
    _require(0 <= beta <= 1, f'--beta {beta}: must be in [0, 1] (0: forward KL, 0.5: JSD, 1: reverse KL).')
    _require(0 <= args.lmbda <= 1, f'--lmbda {args.lmbda}: must be in [0, 1] (the share of samples that the student answers).')
    _require(
        args.temperature > 0 or (args.temperature == 0 and args.gkd_temperature is not None),
        f'--temperature {args.temperature}: must be > 0, for it softens the divergence too; for greedy sampling '
        'give --temperature 0 together with --gkd_temperature 1.',
    )
    if args.gkd_temperature is not None:
        _require(args.gkd_temperature > 0, f'--gkd_temperature {args.gkd_temperature}: must be > 0; 1 compares the plain distributions.')
    if args.gkd_teacher_temperature is not None:
        _require(args.gkd_teacher_temperature >= 0, f'--gkd_teacher_temperature {args.gkd_teacher_temperature}: must be >= 0 (0: greedy).')
    if args.gkd_eval_temperature is not None:
        _require(args.gkd_eval_temperature >= 0, f'--gkd_eval_temperature {args.gkd_eval_temperature}: must be >= 0 (0: greedy).')
    size = args.gkd_teacher_batch_size
    _require(size is None or size > 0, f'--gkd_teacher_batch_size {size}: must be > 0.')
    budget = args.gkd_micro_batch_tokens
    _require(budget is None or budget > 0, f'--gkd_micro_batch_tokens {budget}: must be > 0.')
    if args.gkd_teacher_max_completion_length is not None:
        _require(
            args.gkd_teacher_max_completion_length > 0,
            f'--gkd_teacher_max_completion_length {args.gkd_teacher_max_completion_length}: must be > 0.',
        )
    _require(args.max_completion_length > 0, f'--max_completion_length {args.max_completion_length}: must be > 0.')
    for name, of in (('sft_alpha', 'cross-entropy'), ('gkd_loss_weight', 'divergence')):
        value = getattr(args, name)
        _require(0 <= value < math.inf, f'--{name} {value}: must be >= 0 and finite (the weight of the {of}).')
    _check_sampled(args)
    _check_ratios(args)
    _check_extrapolation(args)
    _check_rewards(args)
    _require(
        args.gkd_loss_weight > 0 or args.sft_alpha > 0 or learns_from_rewards(args),
        f'--gkd_loss_weight {args.gkd_loss_weight} with --sft_alpha {args.sft_alpha}'
        + (f' and --gkd_rl_weight {args.gkd_rl_weight}' if has_rewards(args) else '')
        + ': the loss would be 0; raise one of them.',
    )
    _require(
        args.gkd_loss_weight > 0 or args.lmbda == 0 or learns_from_rewards(args),
        f'--gkd_loss_weight 0 with --lmbda {args.lmbda}: responses of the student would have no loss at all; set --lmbda 0, or give '
        '--reward_funcs or --reward_model.',
    )
    _require(1e-6 <= args.gkd_skew < 1, f'--gkd_skew {args.gkd_skew}: must be in [1e-6, 1); DistiLLM uses 0.1.')
    for name, allowed in (
        ('gkd_divergence', DIVERGENCES),
        ('gkd_source_per', ('sample', 'batch')),
        ('gkd_tail', ('bucket', 'renormalize')),
        ('gkd_on_missing_engine', ('generate', 'dataset')),
        ('gkd_eval_source', SOURCES),
        ('gkd_teacher_engine', ('transformers', 'vllm')),
        ('gkd_routing', ('own', 'teacher')),
        ('gkd_signal', SIGNALS),
        ('gkd_rl_schedule', RL_SCHEDULES),
        ('gkd_on', DISTILLED),
    ):
        _require(getattr(args, name) in allowed, f'--{name} {getattr(args, name)}: must be one of {", ".join(allowed)}.')
    _require(0 <= args.gkd_ema_decay <= 1, f'--gkd_ema_decay {args.gkd_ema_decay}: must be in [0, 1].')
    _require(
        args.gkd_self_teacher is None or args.teacher_model_server is None,
        f'--gkd_self_teacher {args.gkd_self_teacher} and --teacher_model_server {args.teacher_model_server}: give one of them.',
    )
    _require(
        args.gkd_routing == 'own' or args.teacher_model_server is None,
        f'--gkd_routing {args.gkd_routing} and --teacher_model_server {args.teacher_model_server}: a server does not say which experts it '
        'chose; leave one of them out.',
    )
    offload = args.gkd_teacher_offload
    _require(offload in (None, 'model', 'layer'), f'--gkd_teacher_offload {offload}: must be model or layer.')
    method, bits = args.teacher_quant_method, args.teacher_quant_bits
    _require(method in (None, 'none', *QUANTISERS), f'--teacher_quant_method {method}: must be none or one of {", ".join(QUANTISERS)}.')
    allowed = QUANTISERS.get(method, (None,))
    _require(
        bits in allowed,
        f'--teacher_quant_bits {bits} with --teacher_quant_method {method}: must be '
        f'{" or ".join("left out" if n is None else str(n) for n in allowed)}.',
    )
    _require(
        args.teacher_device_map is None or teacher_offload(args) is None,
        f'--teacher_device_map {args.teacher_device_map} and --gkd_teacher_offload {teacher_offload(args)}: give one of them.',
    )
    _require(
        args.teacher_max_memory is None or args.teacher_device_map is not None,
        f'--teacher_max_memory {args.teacher_max_memory}: it belongs to --teacher_device_map auto.',
    )
    if args.gkd_logits_topk is not None:
        _require(args.gkd_logits_topk > 0, f'--gkd_logits_topk {args.gkd_logits_topk}: must be > 0; leave it out for the full vocabulary.')
        _require(
            args.gkd_logits_topk > 1 or args.gkd_tail == 'bucket',
            '--gkd_logits_topk 1 with --gkd_tail renormalize: one renormalised id has probability 1 on both sides and the loss is '
            'always 0; raise k or use --gkd_tail bucket.',
        )
    _require(
        args.teacher_model is None or args.teacher_model_server is None,
        f'--teacher_model {args.teacher_model} and --teacher_model_server {args.teacher_model_server}: give one of them.',
    )
    _require(
        args.teacher_model_server is None or args.gkd_logits_topk is not None or args.gkd_signal == 'sampled',
        '--teacher_model_server without --gkd_logits_topk: a server sends the k largest log-probabilities; say how many.',
    )
    _require(
        not args.gkd_prefetch or (args.use_vllm and args.vllm_mode == 'server'),
        '--gkd_prefetch true: only a server can generate while a step trains; add --use_vllm true --vllm_mode server.',
    )
    _require(
        not (args.gkd_prefetch and args.multi_turn_scheduler),
        f'--gkd_prefetch true with --multi_turn_scheduler {args.multi_turn_scheduler}: its turns are made by the trainer; give the '
        'scheduler to swift rollout.',
    )
    _require(args.gkd_num_samples > 0, f'--gkd_num_samples {args.gkd_num_samples}: must be > 0 (responses per prompt).')
    if args.gkd_generation_tokens is not None:
        _require(
            args.gkd_generation_tokens > 0,
            f'--gkd_generation_tokens {args.gkd_generation_tokens}: must be > 0 (a prompt that needs more is answered alone).',
        )
    _require(args.gkd_server_timeout > 0, f'--gkd_server_timeout {args.gkd_server_timeout}: must be > 0 seconds.')
    _require(args.gkd_server_retry_seconds >= 0, f'--gkd_server_retry_seconds {args.gkd_server_retry_seconds}: must be >= 0 (0: never).')
    _require(args.gkd_server_in_flight > 0, f'--gkd_server_in_flight {args.gkd_server_in_flight}: must be > 0.')
    teacher_answers = args.seq_kd or args.gkd_eval_source == 'teacher'
    flag = '--seq_kd true' if args.seq_kd else '--gkd_eval_source teacher'
    _require(
        not teacher_answers
        or args.teacher_model is not None
        or args.teacher_model_server is not None
        or args.teacher_adapters
        or args.gkd_self_teacher in ('base', 'ema'),
        f'{flag} needs a teacher that can generate: give --teacher_model, --teacher_adapters or --teacher_model_server, or '
        '--gkd_self_teacher base or ema.',
    )
    _require(
        args.gkd_teacher_engine == 'transformers' or (args.teacher_model is not None and not args.teacher_adapters),
        f'--gkd_teacher_engine {args.gkd_teacher_engine}: it needs a --teacher_model, with --teacher_adapters merged into it.',
    )
    _require(
        not (args.truncation_strategy == 'right' and (args.lmbda > 0 or args.seq_kd)),
        '--truncation_strategy right with generated responses: it would cut the end of a prompt, and the response would answer '
        'something else; use delete or left, or --lmbda 0 with dataset responses.',
    )
    _require(
        args.truncation_strategy != 'split',
        '--truncation_strategy split: it cuts pre-training text into pieces and does not fit responses; use delete, left or right.',
    )
