"""A teacher on a layout of its own, on the ranks that the student trains on.

megatron-core and its bridge ask the module ``megatron.core.parallel_state`` which ranks belong together, in over a hundred places. A
:class:`Layout` holds a second set of everything that this module knows, and of what else belongs to a layout; inside
:meth:`Layout.entered` the teacher's is in place, outside the student's.

The student's data-parallel ranks each own some micro-batches of a step. Those are shared out over the teacher's replicas, and the hidden
states of their trained tokens come back to the owners, without padding. The loss reads the rows of the teacher's output head that belong
to the student's vocabulary shard; they are collected once.
"""

from __future__ import annotations

import importlib.util
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.distributed as dist
from mcore_bridge.bridge import gpt_bridge
from megatron.core import mpu, parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe import fused_a2a, moe_utils
from swift.megatron.utils import get_padding_to
from swift.utils import get_current_device, get_logger
from torch import nn

from ..step.random_state import RandomState
from ..step.samples import InTurn, MicroBatch
from ..teachers import HiddenStates, Signal, TopKOptions
from ..world import exchange_objects, from_all
from .exchange import exchange_rows, numbers_of_all
from .head import HeadShard, HeadTensors
from .options import schedule_multiple
from .questions import TOKENS, Groups, Question, together
from .rota import Rota
from .teachers import LocalTeacher, host_copy
from .views import LocalView, local_view

logger = get_logger()

# What belongs to a layout outside of megatron.core.parallel_state, with the value that it has in a new process: the bridge's groups, the
# buffers of DeepEP and HybridEP, which know their group, and what routers log. Transformer Engine's state of FP8 is the student's alone:
# a separate teacher has neither FP8 nor FP4 (options.teacher_arguments), and layers without them do not touch it.
OTHER_STATE: tuple[tuple[ModuleType, dict[str, Any]], ...] = (
    (gpt_bridge, {'EP_PP_GROUP': None, 'EP_PP_RANK': None, 'EP_PP_SIZE': None}),
    (fused_a2a, {'_buffer': None, '_hybrid_ep_buffer': None}),
    (moe_utils, {'_MOE_LAYER_WISE_LOGGING_TRACKER': {}}),
)


def fresh_parallel_state() -> dict[str, Any]:
    """Every global of ``megatron.core.parallel_state`` that is data, with the value that it has in a new process."""
    spec = importlib.util.find_spec(parallel_state.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = (type(None), bool, int, list, dict)
    return {name: value for name, value in vars(module).items() if not name.startswith('__') and isinstance(value, kinds)}


class TrackedRandomState(RandomState):
    """With Python's, numpy's and megatron-core's own generators, as they are now."""

    def __init__(self):
        super().__init__(torch.device(get_current_device()))
        self.python, self.array = random.getstate(), numpy.random.get_state()
        tracked = get_cuda_rng_tracker().get_states()
        # Under CUDA graphs a state is a generator that draws in place; otherwise a tensor that is replaced.
        self.tracked = {name: s.get_state() if isinstance(s, torch.Generator) else s for name, s in tracked.items()}

    def restore(self) -> None:
        super().restore()
        random.setstate(self.python)
        numpy.random.set_state(self.array)
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        for name, state in self.tracked.items():
            if isinstance(states[name], torch.Generator):
                states[name].set_state(state)
            else:
                states[name] = state
        tracker.set_states(states)


class Layout:
    """Process groups for other sizes than the student's, on the same ranks. A collective call.

    Args:
        args: ms-swift's arguments with the sizes of this layout (:func:`.options.teacher_arguments`).
    """

    def __init__(self, args):
        self.args = args
        self._inside = False
        self._elsewhere = [(parallel_state, fresh_parallel_state()), *((module, dict(values)) for module, values in OTHER_STATE)]
        with self.entered():
            mpu.initialize_model_parallel(
                args.tensor_model_parallel_size,
                args.pipeline_model_parallel_size,
                args.virtual_pipeline_model_parallel_size,
                context_parallel_size=args.context_parallel_size,
                expert_model_parallel_size=args.expert_model_parallel_size,
                expert_tensor_parallel_size=args.expert_tensor_parallel_size,
                distributed_timeout_minutes=args.ddp_timeout // 60,
                create_gloo_process_groups=False,  # for the checkpoints of an optimizer
            )

    def warm_up(self) -> None:
        """``--nccl_comm_warmup``: make the communicators while there is memory, as ms-swift does for the student's groups (4.6.0,
        megatron/trainers/base.py:679). A collective call."""
        dummy, warmed = torch.zeros(1, device=get_current_device()), 0
        with self.entered():
            for group in (
                mpu.get_data_parallel_group(with_context_parallel=True),
                mpu.get_data_parallel_group(),
                mpu.get_context_parallel_group(),
                mpu.get_tensor_model_parallel_group(),
                mpu.get_pipeline_model_parallel_group(),
                mpu.get_model_parallel_group(),
                mpu.get_expert_model_parallel_group(),
                mpu.get_expert_tensor_parallel_group(),
                mpu.get_expert_tensor_and_model_parallel_group(),
            ):
                dist.all_reduce(dummy, group=group)
                warmed += 1
        logger.info(f"NCCL communicator warm-up of the teacher's layout done ({warmed} groups).")

    def _swap(self) -> None:
        for module, values in self._elsewhere:
            for name, value in values.items():
                values[name] = getattr(module, name)
                setattr(module, name, value)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This layout's groups in place of the student's; random numbers that are drawn inside leave no trace."""
        if self._inside:
            yield
            return
        numbers = TrackedRandomState()
        self._swap()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._swap()
            numbers.restore()


def common_padding(*layouts) -> tuple[int | None, int]:
    """What the length of a micro-batch has to be a multiple of (None: anything), and the context-parallel size that its rows are cut for,
    so that every layout can split it.

    Args:
        layouts: ms-swift's arguments of each.
    """
    cp = math.lcm(*(args.context_parallel_size for args in layouts))
    multiples = [n for n in map(get_padding_to, layouts) if n is not None]
    if len(layouts) > 1 and cp > 1:
        multiples.append(2 * cp)  # of each row two parts per rank
    return math.lcm(*multiples) if multiples else None, cp


@dataclass(frozen=True)
class Seat:
    """Where a rank sits in a layout.

    Attributes:
        replica: Its data-parallel rank.
        shard: Its tensor-parallel rank.
        head: Whether it is on the last pipeline stage.
    """

    replica: int
    shard: int
    head: bool

    @classmethod
    def here(cls) -> Seat:
        last = mpu.is_pipeline_last_stage(ignore_virtual=True)
        return cls(mpu.get_data_parallel_rank(), mpu.get_tensor_model_parallel_rank(), last)


class RelocatedTeacher(LocalTeacher):
    """A separate, frozen model on a layout of its own.

    Args:
        args: ms-swift's arguments, with the student's layout.
        layout: The teacher's.
        chunks: The model's chunks on this rank.
        offload: Keep the weights on the host between its visits.
    """

    def __init__(self, args, layout: Layout, chunks: list[nn.Module], offload: bool = False):
        super().__init__(layout.args, chunks)
        self.student_args, self.layout = args, layout
        theirs = layout.args
        self.description = (
            f'a separate model on its own layout (TP {theirs.tensor_model_parallel_size}, PP {theirs.pipeline_model_parallel_size}, '
            f'CP {theirs.context_parallel_size}, EP {theirs.expert_model_parallel_size})'
        )
        with layout.entered():
            seat, self.replicas = Seat.here(), mpu.get_data_parallel_world_size()
        # The student's seat and the teacher's, of every rank.
        self.seats: list[tuple[Seat, Seat]] = from_all((Seat.here(), seat))
        config = chunks[0].config
        self.like = torch.empty(0, config.hidden_size, dtype=config.params_dtype, device=get_current_device())
        with torch.no_grad():
            self.loss_head = HeadShard(self._head_of_student_shard())
        # The model's own head is not needed on the device for the loss.
        with layout.entered():
            self.host_copy = host_copy(chunks) if offload else None

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.layout.entered(), super().ready():
            yield

    def signals(self, batches: InTurn, topk: TopKOptions | None = None) -> list[Signal | None]:
        batches = list(batches)  # they go to other ranks, all at once
        rota, questions, tokens = self._bring_together(batches)
        groups = self._together(rota, questions, tokens)
        with self.ready():
            found = self._states(groups.batches)
        states = self._bring_home(rota, groups.apart(found), batches)
        if self.loss_head.shard is None:
            return [None] * len(batches)
        with torch.no_grad():
            return [self._reduced(states[n], topk) if topk else HiddenStates(states[n], self.loss_head) for n in range(len(batches))]

    def _kept(self, states: torch.Tensor, batch: Question, view: LocalView, chunk: nn.Module) -> torch.Tensor:
        whole = view.whole(states)
        parts = [whole[part] for part in batch.kept]
        return parts[0] if len(parts) == 1 else torch.cat([whole[:0], *parts])

    def _together(self, rota: Rota, questions: list[Question], tokens: int) -> Groups:
        """What each forward of this rank's replica is for. A collective call where experts are spread over replicas, for these run the
        same number of forwards."""
        args, replica = self.args, self.seats[dist.get_rank()][1].replica
        stages = args.pipeline_model_parallel_size
        if self.student_args.gkd_teacher_batch_size is not None:
            tokens = 0
        answered = [rota.answered(replica, turn) is not None for turn in range(rota.rounds)]
        groups = together(questions, answered, tokens, 2 * stages if stages > 1 else 1)
        wanted = max(numbers_of_all(len(groups))) if args.expert_model_parallel_size > 1 else len(groups)
        multiple = schedule_multiple(args)
        return Groups(questions, groups, -(-wanted // multiple) * multiple)

    def _bring_together(self, batches: list[MicroBatch]) -> tuple[Rota, list[Question], int]:
        """The micro-batches of this rank's replica of the teacher, from their owners in the student's layout, and how many tokens one
        forward is to have at most.

        Of the ranks that own the same micro-batches each sends to those in its own data-parallel group.
        """
        group = mpu.get_data_parallel_group()
        counts = numbers_of_all(len(batches), group)
        rota = Rota.make(counts, self.replicas, schedule_multiple(self.args))
        owner = dist.get_rank(group)
        asked = [Question(batch.teacher_inputs or batch.student_inputs, batch.teacher_index) for batch in batches]
        largest = max(numbers_of_all(max((question.size for question in asked), default=0), group))
        outgoing = []
        for rank in dist.get_process_group_ranks(group):
            wanted = {number for of, number in rota.of(self.seats[rank][1].replica) if of == owner}
            outgoing.append({n: asked[n] for n in sorted(wanted)})
        received = exchange_objects(outgoing, get_current_device(), group)
        replica = self.seats[dist.get_rank()][1].replica
        questions = [received[of][n].keeping(bool(self._receivers(rota, turn))) for turn, (of, n) in enumerate(rota.of(replica))]
        return rota, questions, max(largest, TOKENS)

    def _receivers(self, rota: Rota, turn: int) -> list[int]:
        """The ranks that get the states of this rank's replica from this rank, which may be one of them."""
        me = dist.get_rank()
        teacher = self.seats[me][1]
        answered = rota.answered(teacher.replica, turn) if teacher.head else None
        if answered is None:
            return []
        owners = [rank for rank, (seat, _) in enumerate(self.seats) if seat.head and seat.replica == answered[0]]
        return [rank for rank in owners if self._source(rank, replica=teacher.replica) == me]

    def _bring_home(self, rota: Rota, found: list[torch.Tensor], batches: list[MicroBatch]) -> dict[int, torch.Tensor]:
        """The hidden states of this rank's own trained tokens, [n_here, dim] by number of the micro-batch, on the student's last stage.

        One round at a time, so that no more than a micro-batch is there twice.

        Args:
            found: [n, dim] of each round, on the teacher's last stage, where this rank is the one that hands them on; else empty.
        """
        me = dist.get_rank()
        student = self.seats[me][0]
        states = {}
        for turn in range(rota.rounds):
            outgoing, expected, numbers = {}, {}, {}
            receivers = self._receivers(rota, turn)
            if receivers:
                outgoing = dict.fromkeys(receivers, found[turn].to(self.like.dtype))
            for replica in range(self.replicas) if student.head else ():
                answered = rota.answered(replica, turn)
                if answered is not None and answered[0] == student.replica:
                    source = self._source(me, replica=replica)
                    expected[source], numbers[source] = len(batches[answered[1]].teacher_index), answered[1]
            for source, rows in exchange_rows(outgoing, expected, self.like).items():
                states[numbers[source]] = self._own_part(rows, batches[numbers[source]])
            if found:
                found[turn] = None
        return states

    def _own_part(self, states: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """[n, dim] -> [n_here, dim], the tokens of this context-parallel rank of the student."""
        args = self.student_args
        if args.context_parallel_size == 1:
            return states
        stages = args.virtual_pipeline_model_parallel_size
        return local_view(args, batch.student_inputs, batch.student_index, None if stages is None else stages - 1).of(states)

    def _source(self, rank: int, **wanted: int) -> int:
        """Which of the ranks that have the same thing sends it to ``rank``: itself, or another one in turn."""
        sources = [q for q, (_, seat) in enumerate(self.seats) if seat.head and all(getattr(seat, k) == v for k, v in wanted.items())]
        return rank if rank in sources else sources[rank % len(sources)]

    def _head_of_student_shard(self) -> HeadTensors | None:
        """The rows of the teacher's head that belong to this rank's vocabulary shard of the student; None before its last stage.

        Both sides hold consecutive rows, filled up to equal shards. Heads of megatron-core have no bias.
        """
        columns, me = self.head.columns, dist.get_rank()
        student, teacher = self.seats[me]
        theirs = -(-columns // self.args.tensor_model_parallel_size)
        ours = -(-columns // self.student_args.tensor_model_parallel_size)

        def common(shard: int, of_teacher: int) -> range:
            return range(max(shard * ours, of_teacher * theirs), min((shard + 1) * ours, (of_teacher + 1) * theirs, columns))

        outgoing, expected, places = {}, {}, {}
        if teacher.head:
            weight = self.head.tensors().weight.detach()
            for rank, (seat, _) in enumerate(self.seats):
                rows = common(seat.shard, teacher.shard)
                if seat.head and rows and self._source(rank, shard=teacher.shard) == me:
                    outgoing[rank] = weight[rows.start - teacher.shard * theirs : rows.stop - teacher.shard * theirs]
        for shard in range(self.args.tensor_model_parallel_size) if student.head else ():
            rows = common(student.shard, shard)
            if rows:
                source = self._source(me, shard=shard)
                expected[source], places[source] = len(rows), rows.start - student.shard * ours
        received = exchange_rows(outgoing, expected, self.like)
        if not student.head:
            return None
        whole = self.like.new_zeros(ours, self.like.shape[1])
        for source, rows in received.items():
            whole[places[source] : places[source] + len(rows)] = rows
        return HeadTensors(whole, None, self.head.transform)
