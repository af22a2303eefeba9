"""``--gkd_routing teacher`` on megatron-core: in training a student with routed experts sends its tokens to the experts that the teacher
chose for them, as in ``hf/routing.py``.

megatron-core's routers leave the choice of the k largest scores to an object that they are given (0.16.1,
transformer/moe/router_replay.py). Its own keeps one choice at a time; a pipeline has several micro-batches under way, whose layers may be
computed again later. Ours keeps a step's. Teacher and student are in one layout, so each rank holds the same tokens of both.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from ..arguments import OptionError
from ..step.samples import MicroBatch
from .views import local_view

# What the teacher chose in one chunk for one micro-batch: of each router [tokens, k], of all tokens of this rank; with a view of its own,
# [n, k] of the n trained tokens of the micro-batch.
Choices = list[torch.Tensor]


class RoutingReplay:
    """The teacher's choice of experts for the micro-batches of a step.

    Args:
        args: ms-swift's arguments.
        student, teacher: The chunks of both models on this rank; they may be one.

    Raises:
        OptionError: A router's choice cannot be replayed, or the two models do not have the same routers.
    """

    def __init__(self, args, student: list[nn.Module], teacher: list[nn.Module]):
        self.args = args
        # On every stage as on the last one, which alone is given the labels that tell where tokens are.
        self._everywhere = copy.copy(args)
        self._everywhere.pipeline_model_parallel_size = 1
        mine, theirs = ([_routers(chunk) for chunk in chunks] for chunks in (student, teacher))
        for of_student, of_teacher in zip(mine, theirs, strict=True):
            shapes = [[(r.topk, r.config.num_moe_experts) for r in routers] for routers in (of_student, of_teacher)]
            if shapes[0] != shapes[1]:
                raise OptionError(
                    f'--gkd_routing teacher: the student has routers with (k, experts) {shapes[0]} and the teacher {shapes[1]}; the ids of '
                    'one mean nothing to the other, leave the option out.'
                )
        self._taught: list[deque[Choices]] = [deque() for _ in student]
        self._recording: Choices | None = None
        self._replaying: Choices | None = None
        self._at: torch.Tensor | None = None  # [n, 2]: (place on this rank, number of the trained token) of those that are here
        self._choices: list[_Choice] = []
        for routers in (*theirs, *mine):
            for number, router in enumerate(routers):
                router.router_replay = _Choice(self, number)
                self._choices.append(router.router_replay)

    @contextmanager
    def recorded(self, chunk: nn.Module, batch: MicroBatch) -> Iterator[None]:
        """Around the teacher's forward of one chunk, micro-batch after micro-batch. If it sees something else than the student, its choice
        counts where tokens are trained. A collective call then of the ranks that share the micro-batch's tokens."""
        self._recording = []
        try:
            yield
            choices = self._recording
        finally:
            self._recording = None
        if batch.teacher_inputs is not None and choices:
            choices = self._of_trained(choices, batch)
        self._taught[chunk.vp_stage or 0].append([ids.to(torch.int16) for ids in choices])

    @contextmanager
    def replayed(self, chunk: nn.Module, batch: MicroBatch) -> Iterator[None]:
        """Around the student's forward of one chunk; the micro-batches come as they were recorded."""
        self._replaying = self._taught[chunk.vp_stage or 0].popleft()
        if batch.teacher_inputs is not None and self._replaying:
            self._at = self._places(batch.student_inputs, batch.student_index)
        try:
            yield
        finally:
            self._replaying = self._at = None

    def clear(self) -> None:
        """What is kept of a step goes; its backward passes are over."""
        for taught in self._taught:
            taught.clear()
        for choice in self._choices:
            choice.replayed.clear()

    def chosen(self, number: int, own: torch.Tensor, replayed: deque[torch.Tensor]) -> torch.Tensor:
        """The ids that a router is to use.

        Args:
            number: Of the router in its chunk.
            own: [tokens, k], its own choice.
            replayed: What this router has used in this step, for layers that are computed again.
        """
        if self._recording is not None:
            self._recording.append(own)
            return own
        if self._replaying is not None:
            theirs = self._replaying[number].to(own)
            if self._at is not None:
                here, of = self._at.unbind(1)
                theirs = own.index_copy(0, here, theirs[of])
            replayed.append(theirs.to(torch.int16))
            return theirs
        # Outside of both a router trains only in a layer that is computed again, in the order of the forwards.
        return replayed.popleft().to(own) if replayed and torch.is_grad_enabled() else own

    def _places(self, inputs: dict[str, Any], index: torch.Tensor) -> torch.Tensor:
        """(place among the tokens that a router sees on this rank, number of the trained token), [n_here, 2]."""
        view = local_view(self._everywhere, dict(inputs), index)
        numbers = view.here.nonzero().flatten()
        places = view.index
        if self.args.sequence_parallel:
            cp = mpu.get_context_parallel_world_size()
            size = inputs['input_ids'].numel() // cp // mpu.get_tensor_model_parallel_world_size()
            places = places - mpu.get_tensor_model_parallel_rank() * size
            here = (places >= 0) & (places < size)
            places, numbers = places[here], numbers[here]
        return torch.stack((places, numbers), 1)

    def _of_trained(self, choices: Choices, batch: MicroBatch) -> Choices:
        here, of = self._places(batch.teacher_inputs, batch.teacher_index).unbind(1)
        ks = [ids.shape[1] for ids in choices]
        whole = choices[0].new_zeros(len(batch.teacher_index), sum(ks), dtype=torch.int32)
        whole[of] = torch.cat([ids[here] for ids in choices], 1).to(torch.int32)
        group = mpu.get_tensor_and_context_parallel_group() if self.args.sequence_parallel else mpu.get_context_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(whole, group=group)
        return list(whole.split(ks, 1))


class _Choice:
    """In the place of megatron-core's ``RouterReplay``.

    Args:
        replay: Knows what a router is to use.
        number: Of the router in its chunk.
    """

    def __init__(self, replay: RoutingReplay, number: int):
        self.replay, self.number = replay, number
        self.replayed: deque[torch.Tensor] = deque()

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        ids = self.replay.chosen(self.number, own, self.replayed)
        return (values, own) if ids is own else (scores.gather(1, ids), ids)


def _routers(chunk: nn.Module) -> list[TopKRouter]:
    """In the order in which they run.

    Raises:
        OptionError: The choice of one cannot be replayed.
    """
    routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
    for router in routers:
        config = router.config
        if config.moe_router_fusion or router.routing_type == 'sinkhorn':
            kind = 'sinkhorn' if router.routing_type == 'sinkhorn' else 'moe_router_fusion'
            raise OptionError(f'--gkd_routing teacher: megatron-core replays no choice of routers with {kind}; leave one of them out.')
        if config.cuda_graph_impl not in (None, 'none'):
            raise OptionError(
                f'--gkd_routing teacher with cuda_graph_impl {config.cuda_graph_impl}: a graph has no room for it; leave one out.'
            )
    return routers
