"""What the fullest rank of the Megatron back end will hold, told before any weights load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from ..arguments import engine_scores, extrapolates, teacher_offload
from ..memory import estimates
from ..memory.estimates import FP32, Rows
from ..memory.layout import Layout, head_bytes, parameters, student_bytes
from ..memory.setup import Engines, visiting
from ..memory.setup import Setup as AnySetup
from ..memory.sizes import ModelSize, empty_model
from ..memory.table import GENERATION, PHASES, STUDENT, TEACHER, UPDATE, Part, Table, but
from ..memory.verdict import Card
from ..memory.verdict import foretell as foretell_setup
from .options import SIZES, loads_teacher, teacher_arguments, teacher_options
from .questions import TOKENS

# Options by which full training leaves weights as they are.
FREEZING = ('freeze_parameters', 'freeze_parameters_regex', 'freeze_parameters_ratio', 'trainable_parameters', 'trainable_parameters_regex')

MAIN, MOMENTS = FP32, {'adam': 2 * FP32, 'sgd': FP32}  # bytes of a number's fp32 copy and of its moments


@dataclass(frozen=True)
class Setup(AnySetup):
    """The student is without its adapter.

    Attributes:
        layout, own: Of the student and of the teacher.
        gradient, state: Bytes that a trained number's gradient and the optimizer take; ``state`` is None if it is not known.
        distributed: ``--use_distributed_optimizer``.
        rank: Of the adapter; None for full training.
        recomputed: Share of the layers that are computed again for the backward pass, and how many of them at a time.
        sequence_parallel: Of the student.
        offload: Whether the teacher lives on the host.
        lends: Whether the teacher's visits have the memory of the gradients then.
        moves: Whether they have that of the optimizer; None for if they need it.
        averaged: Whether a moving average of what is trained teaches.
        away: Whether weights and gradients, and the optimizer, leave while vLLM generates.
        even: Whether layers are dealt out evenly.
        sure_trained: Whether all weights, or those of an adapter, are trained, and not some of them.
        sure_state: Whether the optimizer keeps fp32 copies on the device, and nothing else.
    """

    layout: Layout
    own: Layout
    gradient: int
    state: int | None
    distributed: bool
    rank: int | None
    recomputed: tuple[float, int]
    sequence_parallel: bool
    offload: bool
    lends: bool
    moves: bool | None
    averaged: bool
    away: tuple[bool, bool]
    even: bool
    sure_trained: bool
    sure_state: bool


def table(setup: Setup) -> Table:
    """What the fullest rank holds."""
    tables = _tables(replace(setup, moves=optimizer_leaves(setup)))
    return max(tables, key=lambda found: found.peak())


def optimizer_leaves(setup: Setup) -> bool:
    """Whether the optimizer's state is on the host while the teacher visits: as asked for, or where a card cannot hold both."""
    if not setup.lends or setup.moves is not None or setup.card is None:
        return bool(setup.lends and setup.moves)
    visits = (TEACHER,) * setup.scores + (GENERATION,) * setup.rows.answers_of_teacher
    return any(
        without.held(phase) < held.held(phase) > setup.card.bytes
        for held, without in zip(_tables(replace(setup, moves=False)), _tables(replace(setup, moves=True)), strict=True)
        for phase in visits
    )


def _tables(setup: Setup) -> list[Table]:
    """Of the ranks of each stage, the student's and the teacher's."""
    phases = {STUDENT, UPDATE, *setup.engines.phases} | ({TEACHER} if setup.scores else set())
    if setup.rows.answers:
        phases.add(GENERATION)
    # Stages are consecutive ranks in both layouts.
    world = setup.layout.world
    places = dict.fromkeys((r // (world // setup.layout.pp), r // (world // setup.own.pp)) for r in range(world))
    return [
        Table(
            tuple(part for part in _parts(setup, *place) if part.bytes), tuple(p for p in PHASES if p in phases), tuple(_not_counted(setup))
        )
        for place in places
    ]


def _parts(setup: Setup, stage: int, teacher_stage: int) -> Iterable[Part]:
    size, layout, b = setup.student, setup.layout, setup.student.inside.itemsize
    held = student_bytes(
        size,
        layout,
        stage,
        trained=setup.rank is None,
        itemsize=b,
        gradient=setup.gradient,
        state=setup.state or 0,
        distributed=setup.distributed,
    )
    gone, optimizer_gone = ({GENERATION} if away else set() for away in setup.away)
    gradients, optimizer = held.get('student gradients', 0), held.get('optimizer', 0)
    lends, moves = ({TEACHER} if leaves else set() for leaves in (setup.lends, setup.lends and setup.moves))
    yield Part('student weights', held['student weights'], but(gone), setup.even)
    sure = setup.even and setup.sure_trained
    yield Part('gradients', gradients, but(gone | lends), sure)
    yield Part('optimizer', optimizer, but(optimizer_gone | moves), sure and setup.sure_state)
    trained = held['student weights'] // b if setup.rank is None else size.low_rank(setup.rank) // layout.pp
    if setup.averaged:
        yield Part("the teacher's average", FP32 * trained, PHASES, sure and setup.rank is None)
    if setup.rank is not None:
        share = layout.dp * layout.cp if setup.distributed else 1
        yield Part('adapter, trained', trained * (b + setup.gradient) + trained // share * (setup.state or 0), PHASES, False)
    left = (gradients if lends and not gone else 0) + (optimizer if moves and not optimizer_gone else 0)
    yield from _of_teacher(setup, stage == layout.pp - 1, teacher_stage, left)
    yield from _of_work(setup, stage)
    yield from setup.engines.parts(setup.card)


def _of_teacher(setup: Setup, last: bool, stage: int, left: int) -> Iterable[Part]:
    """Args: whether it is the student's last stage, the teacher's stage, bytes that have left when the teacher comes to answer."""
    size, own = setup.teacher, setup.own
    if size is None:
        return
    relocated = own != setup.layout
    weights = size.inside.itemsize * sum(parameters(size, own, stage))
    if not setup.offload:
        yield Part('teacher weights', weights, PHASES, setup.even)
    else:
        stays = 0 if relocated or stage < own.pp - 1 else head_bytes(size, own)
        yield Part('teacher weights, the head', stays, PHASES, setup.even)
        yield from visiting(weights - stays, left + setup.engines.asleep(setup.card), setup.rows.answers_of_teacher, setup.even)
    if relocated and last:
        yield Part("teacher's head in the student's layout", head_bytes(size, setup.layout), PHASES, setup.even)


def _of_work(setup: Setup, stage: int) -> Iterable[Part]:
    layout, rows, work = setup.layout, setup.rows, estimates
    inside, teacher = setup.student.inside, setup.teacher or setup.student
    last, tokens = stage == layout.pp - 1, -(-rows.tokens // layout.cp)
    if setup.scores:
        own = setup.own if setup.teacher else layout
        looked_at = min(max(2 * rows.tokens, TOKENS), rows.micro_batches * rows.tokens) if setup.teacher else rows.tokens
        yield Part("the teacher's forward", work.forward_bytes(teacher.inside, looked_at // own.cp, own.tp), (TEACHER,), False)
        if last:
            trained = rows.micro_batches * rows.trained_tokens // layout.cp
            payload = work.payload_bytes(teacher.inside.hidden, trained, setup.topk, teacher.inside.itemsize)
            yield Part('what the teacher leaves', payload, (TEACHER, STUDENT), False)
            beside = work.payload_bytes(inside.hidden, trained, itemsize=inside.itemsize) * setup.extrapolates
            yield Part('what the reference leaves', beside, (TEACHER, STUDENT), False)
    under_way = min(layout.pp - stage, rows.micro_batches)
    layers, (share, at_a_time) = -(-inside.layers // layout.pp), setup.recomputed
    kept = math.ceil(layers * share)
    whole = (layers - kept) * under_way + min(at_a_time, kept)
    held = work.activation_bytes(
        inside, tokens, -(-kept // max(at_a_time, 1)) * under_way, whole, tp=layout.tp, sequence_parallel=setup.sequence_parallel
    )
    yield Part(f'activations, {rows.rows} x {rows.length} tokens', held, (STUDENT,), False)
    if last:
        width = math.ceil(inside.vocab / layout.tp)
        device = 'cpu' if setup.card is None else 'cuda'
        trained = rows.trained_tokens // layout.cp
        how = {'device': device, 'sharded': layout.tp > 1, 'trained': setup.rank is None}
        yield Part('divergence: a chunk of logits', work.operator_bytes(inside.hidden, width, trained, **how), (STUDENT,), False)
    if rows.answers:
        answering, there = (teacher, setup.own) if rows.answers_of_teacher else (setup.student, layout)
        per_token = answering.cache and answering.cache // (there.tp * there.pp)
        yield Part('keys and values', work.cache_bytes(per_token, rows.answers, rows.length, rows.budget), (GENERATION,), False)


def _not_counted(setup: Setup) -> Iterable[str]:
    yield 'CUDA context, NCCL, unused blocks of the allocator'
    if setup.state is None:
        yield 'the optimizer, which is unknown'
    yield from setup.engines.not_counted(setup.card)


# --- from the options ---


def foretell(args: Any, card: Card | None) -> bool:
    """Whether the optimizer's state has to leave while the teacher visits.

    Args: ms-swift's arguments, the card of this rank.
    """
    setup = foretell_setup(lambda: setup_of(args, card), table, lambda setup: changes(setup, args))
    return setup is not None and optimizer_leaves(setup)


def bytes_of_moments(args: Any) -> int | None:
    """What the optimizer keeps of a number beside its fp32 copy; None if it is not known."""
    return 0 if args.optimizer == 'sgd' and not args.sgd_momentum else MOMENTS.get(args.optimizer)


def setup_of(args: Any, card: Card | None) -> Setup:
    student, teacher, theirs = ModelSize.of(empty_model(args)), None, args
    if loads_teacher(args):
        which = {'model': args.teacher_model, 'model_type': args.teacher_model_type, 'revision': args.teacher_model_revision}
        teacher = ModelSize.of(empty_model(args, **which))
        theirs = teacher_arguments(args)
    world = dist.get_world_size()
    layout, own = (Layout(world, *(getattr(which, name) for name in SIZES)) for which in (args, theirs))
    micro_batches = args.global_batch_size // (args.micro_batch_size * layout.dp)
    offload = teacher is not None and teacher_offload(args) == 'model'
    colocated = args.use_vllm and args.vllm_mode == 'colocate'
    wide = args.torch_dtype.itemsize == FP32
    full = args.recompute_granularity == 'full'
    at_a_time = args.recompute_num_layers or 1
    block = full and args.recompute_method == 'block'
    share = min(at_a_time / (student.inside.layers / layout.pp), 1) if block else float(full)
    uneven = (args.pipeline_model_parallel_layout, args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers)
    state = bytes_of_moments(args)
    return Setup(
        student=student,
        teacher=teacher,
        rows=Rows.of(args, args.micro_batch_size, micro_batches),
        layout=layout,
        own=own if teacher_options(args) else layout,
        gradient=FP32 if args.accumulate_allreduce_grads_in_fp32 else args.torch_dtype.itemsize,
        state=None if state is None else state + (0 if wide else MAIN),
        distributed=args.use_distributed_optimizer,
        rank=None if args.tuner_type == 'full' else args.lora_rank,
        recomputed=(share, 1 if block else at_a_time),
        sequence_parallel=args.sequence_parallel,
        offload=offload,
        lends=offload and not args.optimizer_cuda_graph,
        moves=args.gkd_optimizer_offload,
        averaged=args.gkd_self_teacher == 'ema',
        scores=args.gkd_loss_weight > 0 and args.teacher_model_server is None and not engine_scores(args),
        topk=args.gkd_logits_topk,
        extrapolates=extrapolates(args),
        engines=Engines.of(args),
        away=(bool(colocated and args.offload_model), bool(colocated and args.offload_optimizer)),
        card=card,
        even=all(value is None for value in uneven) and not args.model_meta.is_multimodal and args.tuner_type in ('full', 'lora'),
        sure_trained=not any(getattr(args, name, None) for name in FREEZING),
        sure_state=not (args.optimizer_cpu_offload or args.use_precision_aware_optimizer),
    )


def changes(setup: Setup, args: Any) -> dict[str, Callable[[Setup], Setup]]:
    """Options that make a run smaller, without taking anything from what is learnt, and then the others."""
    found: dict[str, Callable[[Setup], Setup]] = {}
    layout, rows = setup.layout, setup.rows
    if setup.engines.student is not None and not setup.engines.sleeps:
        found['--sleep_level 1'] = lambda s: replace(s, engines=replace(s.engines, sleeps=True))
    if setup.recomputed != (1.0, 1):
        found['--recompute_granularity full --recompute_method uniform --recompute_num_layers 1'] = lambda s: replace(
            s, recomputed=(1.0, 1)
        )
    if rows.rows > 1:
        found['--micro_batch_size 1'] = lambda s: replace(s, rows=replace(rows, rows=1, micro_batches=rows.micro_batches * rows.rows))
    if setup.teacher is not None and not setup.offload:
        found['--gkd_teacher_offload model'] = lambda s: replace(s, offload=True, lends=not args.optimizer_cuda_graph)
    if setup.lends and setup.moves is False:
        found['--gkd_optimizer_offload true'] = lambda s: replace(s, moves=True)
    if setup.teacher is not None and not teacher_options(args):
        tp = max((n for n in (2, 4, 8) if layout.world % n == 0), default=1)
        if tp > layout.tp and setup.teacher.inside.keys % tp == 0:
            found[f'--teacher_tensor_model_parallel_size {tp}'] = lambda s: replace(s, own=replace(s.own, tp=tp, pp=1, cp=1))
    wider = 2 * layout.tp
    if layout.world % (wider * layout.pp * layout.cp) == 0 and setup.student.inside.keys % wider == 0:
        together = setup.own == layout
        found[f'--tensor_model_parallel_size {wider}'] = lambda s: replace(
            s, layout=replace(s.layout, tp=wider), own=replace(s.own, tp=wider) if together and s.own == s.layout else s.own
        )
    if setup.rank is None:
        found['--tuner_type lora'] = lambda s: replace(s, rank=args.lora_rank)
    return found
