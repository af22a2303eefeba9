"""What the Megatron back end cannot do, or not in this layout, is said in one line before a process group or a model exists."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..arguments import OptionError, engine_scores, extrapolates
from ..sources import STUDENT, TEACHER

# Options that are refused: name, when, and what to do instead.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ('use_ray', lambda a: a.use_ray, "ms-swift's Ray pipeline has begun without the plugin; install it instead of --external_plugins"),
    ('vllm_mode', lambda a: a.use_vllm and a.vllm_mode is None, 'give colocate or server, or --use_vllm false'),
    ('gkd_teacher_offload', lambda a: a.gkd_teacher_offload == 'layer', 'the Megatron back end moves the whole teacher; use model'),
    (
        'gkd_optimizer_offload',
        lambda a: a.gkd_optimizer_offload and a.optimizer_cuda_graph,
        'with --optimizer_cuda_graph a captured update reads the state where it was; leave one of them out',
    ),
    # They are kept in few bits and in no others, in which an average is not.
    ('fp8_param_gather', lambda a: a.gkd_self_teacher == 'ema' and a.fp8_param_gather, 'leave it out with --gkd_self_teacher ema'),
    ('fp4_param_gather', lambda a: a.gkd_self_teacher == 'ema' and a.fp4_param_gather, 'leave it out with --gkd_self_teacher ema'),
    ('teacher_quant_method', lambda a: a.teacher_quant_method is not None, 'transformers quantises, not megatron-core; leave it out'),
    ('teacher_device_map', lambda a: a.teacher_device_map is not None, 'the layout places the teacher; see teacher_…_parallel_size'),
    ('streaming', lambda a: a.streaming and a.train_iters is None, 'a stream has no length; give --train_iters'),
    ('save_strategy', lambda a: a.streaming and a.save_strategy == 'epoch', 'a stream has no length; use steps, with --save_steps'),
    ('use_megatron_fsdp', lambda a: a.use_megatron_fsdp, "use megatron-core's own data parallelism with --use_distributed_optimizer"),
    ('bridge_backend', lambda a: a.bridge_backend != 'mcore-bridge', 'use mcore-bridge'),
    ('mtp_num_layers', lambda a: bool(a.mtp_num_layers), 'distillation has no loss for them; leave it out'),
    ('router_replay_mode', lambda a: a.router_replay_mode != 'disabled', 'use disabled'),
    ('sequence_packing_scheduler', lambda a: a.sequence_packing_scheduler is not None, 'leave it out'),
    ('reward_model', lambda a: a.reward_model, "ms-swift's Megatron loads none (4.6.0); ask it on a server, in one of --reward_funcs"),
    ('task_type', lambda a: a.task_type not in (None, 'causal_lm'), 'use causal_lm'),
    ('tuner_type', lambda a: a.tuner_type == 'lora_llm', 'use lora or full'),
    # The bridge adds a router's low-rank term with the adapter off as well (mcore-bridge 1.6.5, tuners/lora.py).
    (
        'target_modules',
        lambda a: (
            (a.gkd_self_teacher == 'base' or (a.teacher_model == a.model and not getattr(a, 'teacher_adapters', None)) or extrapolates(a))
            and a.tuner_type == 'lora'
            and 'all-router' in a.target_modules
        ),
        "the adapter of a router can't be switched off for the teacher or the reference; leave all-router out",
    ),
)


@contextmanager
def said_once() -> Iterator[None]:
    """At start-up every rank finds the same error. torchrun ends all ranks as soon as one has ended, so the others leave the first one the
    time to say it; should it have nothing to say, they do."""
    try:
        yield
    except OptionError:
        if int(os.environ.get('RANK', 0)) > 0:
            time.sleep(10)
        raise


AVERAGE = 'gkd_teacher_average'  # the directory of a checkpoint in which a moving average is


def resumed_from(args: Any) -> tuple[str, str] | None:
    """The checkpoint that training goes on from, and the option that names it; None for a new run."""
    lora = args.tuner_type == 'lora'
    option, other = ('mcore_adapter', 'adapters') if lora else ('mcore_model', 'model')
    checkpoint = getattr(args, option)
    if checkpoint is None and not (lora and not args.adapters):
        # By its safetensors: ms-swift takes the step from there too (4.6.0, megatron/trainers/base.py: _load_iteration).
        weights = args.adapters[0] if lora else args.model
        if os.path.exists(os.path.join(weights, 'latest_checkpointed_iteration.txt')):
            option, checkpoint = other, weights
    return None if args.finetune or checkpoint is None else (checkpoint, f'--{option}')


def check_supported(args: Any) -> None:
    """Raises:
    OptionError: An option that the Megatron back end does not know what to do with.
    """
    for name, applies, instead in REFUSED:
        if applies(args):
            raise OptionError(f'--{name} {getattr(args, name)}: {instead}.')
    tokens, other = args.gkd_micro_batch_tokens, depends_on_micro_batches(args)
    if tokens is not None and other is not None:
        raise OptionError(
            f'--gkd_micro_batch_tokens {tokens} with {other}: that depends on which rows are in a micro-batch together; leave one of them '
            'out.'
        )


def depends_on_micro_batches(args: Any) -> str | None:
    """The option, with its value, under which a token weighs or is routed by what else is in its micro-batch; None without any."""
    coefficients = args.moe_aux_loss_coeff
    given = {
        'moe_aux_loss_coeff': any(coefficients) if isinstance(coefficients, list) else bool(coefficients),
        'moe_z_loss_coeff': bool(args.moe_z_loss_coeff),
        'moe_expert_capacity_factor': args.moe_expert_capacity_factor is not None,
        'moe_router_load_balancing_type': 'sinkhorn' in (args.moe_router_load_balancing_type or ()),
    }
    return next((f'--{name} {getattr(args, name)}' for name, applies in given.items() if applies), None)


# The sizes of a layout; each has an option of the same name with `teacher_` in front.
SIZES = (
    'tensor_model_parallel_size',
    'pipeline_model_parallel_size',
    'context_parallel_size',
    'expert_model_parallel_size',
    'expert_tensor_parallel_size',
)


def teacher_options(args: Any) -> dict[str, int]:
    """The options of a teacher's own layout that are given."""
    given = {f'teacher_{name}': getattr(args, f'teacher_{name}') for name in SIZES}
    return {name: size for name, size in given.items() if size is not None}


def schedule_multiple(args: Any) -> int:
    """What the interleaved schedule of megatron-core 0.16.1 wants the number of micro-batches to be a multiple of; 1 for the others."""
    stages = args.pipeline_model_parallel_size
    if (args.virtual_pipeline_model_parallel_size or 1) == 1:
        return 1
    return math.lcm(stages, args.microbatch_group_size_per_vp_stage or stages)


def teacher_arguments(args: Any, has_experts: bool = False) -> Any:
    """ms-swift's arguments as they are for the teacher: a copy, with its own layout where one is given and the student's elsewhere, and
    without the student's FP8 or FP4, under which weights cannot leave for the host and no single token can be generated.

    How layers are dealt out to the stages follows the student's options as long as the number of stages does. So does the sequence
    parallelism of a teacher with TP, if the student has TP as well: ms-swift switches it off for one that has none, whatever was asked for,
    and here it is on then; and where megatron-core asks for it, with experts.

    Args:
        has_experts: Whether the teacher's layers have any.
    """
    theirs, given = copy.copy(args), teacher_options(args)
    for bits in ('fp8', 'fp4'):
        setattr(theirs, bits, None)
        setattr(theirs, f'{bits}_format', None)
        setattr(theirs, f'{bits}_param_gather', False)
    if isinstance(args.megatron_extra_kwargs, dict):  # a string until ms-swift has read it
        theirs.megatron_extra_kwargs = {k: v for k, v in args.megatron_extra_kwargs.items() if not k.startswith(('fp8', 'fp4'))}
    for name, size in given.items():
        setattr(theirs, name.removeprefix('teacher_'), size)
    if 'teacher_pipeline_model_parallel_size' in given:
        theirs.virtual_pipeline_model_parallel_size = theirs.microbatch_group_size_per_vp_stage = None
        theirs.pipeline_model_parallel_layout = None
        theirs.decoder_first_pipeline_num_layers = theirs.decoder_last_pipeline_num_layers = None
        theirs.account_for_embedding_in_pipeline_split = theirs.account_for_loss_in_pipeline_split = False
    if given:
        alone = args.tensor_model_parallel_size == 1
        theirs.sequence_parallel = theirs.tensor_model_parallel_size > 1 and (args.sequence_parallel or alone or has_experts)
        theirs.tp_comm_overlap = False  # its buffers are made for one layout
    return theirs


def loads_teacher(args: Any) -> bool:
    """Whether a separate teacher is loaded into the training processes, and not only into engines beside them."""
    scores = args.gkd_loss_weight > 0 and not engine_scores(args)
    answers = (args.seq_kd or args.gkd_eval_source == TEACHER) and args.gkd_teacher_engine != 'vllm'
    return args.teacher_model is not None and (scores or answers)


def check_precision(args: Any) -> None:
    """To be asked when it is known whether the teacher is the student's base: ``teacher_model`` is None then.

    Raises:
        OptionError: The student's model is to answer in the training processes under FP8 or FP4, whose matrix products ask for multiples of
            16 tokens where a generation has one.
    """
    bits = next((name for name in ('fp8_format', 'fp4_format') if getattr(args, name) is not None), None)
    if bits is None:
        return
    elsewhere = args.teacher_model_server is not None or args.gkd_teacher_engine == 'vllm'
    of_teacher = args.teacher_model is None and not elsewhere
    answers = (
        ('lmbda', args.lmbda > 0 and not args.use_vllm, 'use --use_vllm true, or --lmbda 0'),
        ('gkd_eval_source', args.gkd_eval_source == STUDENT and not args.use_vllm, 'use --use_vllm true, or dataset'),
        ('seq_kd', args.seq_kd and of_teacher, 'give a separate --teacher_model, which is spared of it'),
        ('gkd_eval_source', args.gkd_eval_source == TEACHER and of_teacher, 'give a separate --teacher_model, or use dataset'),
    )
    for name, applies, instead in answers:
        if applies:
            raise OptionError(
                f'--{name} {getattr(args, name)}: a student with --{bits} {getattr(args, bits)} cannot answer in the training processes; '
                f'{instead}.'
            )


def check_routing(args: Any, student: Any, teacher: Any | None) -> None:
    """``--gkd_routing teacher``, as far as it can be known before the models are built.

    Args:
        student, teacher: Configurations of transformers; None for a teacher that is the student.

    Raises:
        OptionError: The teacher's choice of experts does not reach the student, or means nothing to it.
    """
    if args.gkd_routing != 'teacher' or args.gkd_loss_weight == 0:
        return
    if not num_experts(student):
        raise OptionError(f'--gkd_routing teacher: {args.model} has no routed experts; leave it out.')
    if engine_scores(args):
        raise OptionError('--gkd_routing teacher with --gkd_teacher_engine vllm: an engine does not say which experts it chose.')
    for name, size in teacher_options(args).items():
        raise OptionError(
            f"--gkd_routing teacher with --{name} {size}: in a layout of its own the teacher's tokens lie on other ranks than the "
            "student's; leave one of them out."
        )
    if teacher is not None:
        mine, theirs = ({'layers': c.get_text_config().num_hidden_layers, 'experts': num_experts(c)} for c in (student, teacher))
        if mine != theirs:
            raise OptionError(
                f'--gkd_routing teacher: the student has {mine} and the teacher {theirs}; the ids of one mean nothing to the other, leave '
                'the option out.'
            )


def check_overrides(args: Any) -> None:
    """To be asked when ``--megatron_extra_kwargs`` is read.

    Raises:
        OptionError: It asks for process groups that ms-swift does not make.
    """
    given = args.megatron_extra_kwargs or {}
    kinds = given.get('cp_comm_type')
    hierarchical = {
        'hierarchical_context_parallel_sizes': given.get('hierarchical_context_parallel_sizes'),
        'cp_comm_type': kinds if 'a2a+p2p' in (kinds if isinstance(kinds, list) else [kinds]) else None,
    }
    for name, value in hierarchical.items():
        if value is not None:
            raise OptionError(
                f'--megatron_extra_kwargs {name} {value}: ms-swift makes no hierarchical context-parallel groups; use the cp_comm_type '
                'p2p, a2a or all_gather.'
            )


def check_layout(args: Any) -> None:
    """Raises:
    OptionError: The ranks cannot be arranged as asked, or the batch not be shared out over them.
    """
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    _check_sizes(args, world_size)
    given = teacher_options(args)
    if given:
        if args.teacher_model is None and not args.teacher_adapters:  # which get a model of their own
            name, size = next(iter(given.items()))
            raise OptionError(f'--{name} {size}: only a --teacher_model other than the student has a layout of its own; leave it out.')
        _check_sizes(teacher_arguments(args), world_size, 'teacher_')
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    dp = world_size // (tp * pp * cp)
    if args.global_batch_size % (args.micro_batch_size * dp):
        raise OptionError(
            f'--global_batch_size {args.global_batch_size}: must be a multiple of --micro_batch_size {args.micro_batch_size} x {dp} '
            'data-parallel ranks.'
        )
    vp = args.virtual_pipeline_model_parallel_size
    if vp is not None and vp > 1:
        if pp == 1:
            raise OptionError(f'--virtual_pipeline_model_parallel_size {vp}: needs --pipeline_model_parallel_size of at least 2.')
        micro_batches = args.global_batch_size // (args.micro_batch_size * dp)
        if micro_batches % pp:
            raise OptionError(
                f'--virtual_pipeline_model_parallel_size {vp}: the interleaved schedule needs a multiple of '
                f'--pipeline_model_parallel_size {pp} micro-batches per step, and --global_batch_size gives {micro_batches}.'
            )


def _check_sizes(args: Any, world_size: int, prefix: str = '') -> None:
    """
    Args:
        args: The arguments of the student or of the teacher.
        prefix: Of the options' names.
    """
    tp, pp, cp, ep, etp = sizes = [getattr(args, name) for name in SIZES]
    for name, size in zip(SIZES, sizes, strict=True):
        if size < 1:
            raise OptionError(f'--{prefix}{name} {size}: must be at least 1.')
    if world_size % (tp * pp * cp):
        raise OptionError(
            f'--{prefix}tensor_model_parallel_size {tp} x --{prefix}pipeline_model_parallel_size {pp} x --{prefix}context_parallel_size '
            f'{cp} = {tp * pp * cp} does not divide the {world_size} ranks; change one of them or the number of ranks.'
        )
    if world_size % (ep * etp * pp):
        raise OptionError(
            f'--{prefix}expert_model_parallel_size {ep} x --{prefix}expert_tensor_parallel_size {etp} x '
            f'--{prefix}pipeline_model_parallel_size {pp} = {ep * etp * pp} does not divide the {world_size} ranks; change one of them or '
            'the number of ranks.'
        )


def num_experts(config: Any) -> int:
    """Routed experts of a layer, by a configuration of transformers; 0 without any."""
    text = config.get_text_config()
    return next((n for n in (getattr(text, k, None) for k in ('num_experts', 'num_local_experts', 'n_routed_experts')) if n), 0)


def check_teacher(name: str, config: Any, args: Any) -> None:
    """Check that a separate teacher splits as its own layout asks, or as the student's does.

    Raises:
        OptionError: Layers, heads or experts that cannot be split evenly.
    """
    if teacher_options(args):
        _check_split('--teacher_model', name, config, teacher_arguments(args, bool(num_experts(config))), 'teacher_')
    else:
        check_model('--teacher_model', name, config, args)


def check_model(side: str, name: str, config: Any, args: Any) -> None:
    """Check that a model splits as the layout asks.

    Args:
        side: ``--model`` or ``--teacher_model``, for the message.
        name: The model.
        config: Its configuration of transformers.

    Raises:
        OptionError: Layers, heads or experts that cannot be split evenly.
    """
    _check_split(side, name, config, args)
    tp, ep, experts = args.tensor_model_parallel_size, args.expert_model_parallel_size, num_experts(config)
    if experts and tp > 1 and not args.sequence_parallel:
        raise OptionError(
            f'{side} {name}: has experts, which megatron-core trains with --tensor_model_parallel_size {tp} only under '
            '--sequence_parallel true.'
        )
    if experts and ep == 1 and args.expert_tensor_parallel_size != tp:
        # megatron-core 0.16.1 sums such gradients over the data-parallel ranks only, although each tensor-parallel rank has seen other
        # tokens (extensions/transformer_engine.py: `allreduce` looks at the expert-parallel size alone).
        raise OptionError(
            f'{side} {name}: with --tensor_model_parallel_size {tp}, --expert_tensor_parallel_size {args.expert_tensor_parallel_size} '
            'and --expert_model_parallel_size 1 megatron-core gets wrong gradients for the experts; use '
            f'--expert_tensor_parallel_size {tp}, or --expert_model_parallel_size of 2 and more.'
        )


def _check_split(side: str, name: str, config: Any, args: Any, prefix: str = '') -> None:
    """Args: as of :func:`check_model`, and the prefix of the options' names."""
    text, experts = config.get_text_config(), num_experts(config)
    tp, pp, ep = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.expert_model_parallel_size
    stages = pp * (args.virtual_pipeline_model_parallel_size or 1)
    uneven = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    if all(value is None for value in uneven) and text.num_hidden_layers % stages:
        instead = (
            f'--{prefix}pipeline_model_parallel_size'
            if prefix
            else '--pipeline_model_parallel_size or --virtual_pipeline_model_parallel_size, or give --decoder_first_pipeline_num_layers'
        )
        raise OptionError(
            f'{side} {name}: its {text.num_hidden_layers} layers do not split into {stages} pipeline stages; choose another {instead}.'
        )
    if text.num_attention_heads % tp:
        raise OptionError(
            f'{side} {name}: its {text.num_attention_heads} attention heads do not split over --{prefix}tensor_model_parallel_size {tp}.'
        )
    groups = getattr(text, 'num_key_value_heads', None) or tp
    if groups % tp and tp % groups:
        raise OptionError(
            f'{side} {name}: its {groups} key-value heads do not split over --{prefix}tensor_model_parallel_size {tp}; it must divide them '
            'or be a multiple of them.'
        )
    if experts % ep:
        raise OptionError(f'{side} {name}: its {experts} experts do not split over --{prefix}expert_model_parallel_size {ep}.')
