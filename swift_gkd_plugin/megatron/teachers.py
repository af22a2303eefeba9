"""Local teachers of the Megatron back end: a separate model, the student's base with its adapter off, the live student, its average.

A teacher looks at all micro-batches of an optimizer step in one pass of the pipeline schedule, before the student's first forward. What
stays of it are the hidden states of the trained tokens, on the ranks of the last stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from swift.utils import get_current_device, get_logger
from torch import nn

from ..responses.local import evaluation_mode
from ..step.samples import InTurn, MicroBatch
from ..teachers import HiddenStates, Signal, TopK, TopKOptions
from ..teachers.adapters import adapters_off, check_frozen_base
from ..teachers.average import TaughtByAverage
from ..teachers.offload import HostCopy
from .chunks import for_each_chunk
from .head import HeadShard, HeadTensors, OutputHead
from .routing import RoutingReplay
from .views import LocalView, local_view

logger = get_logger()


def host_copy(chunks: list[nn.Module], head: OutputHead | None = None) -> HostCopy:
    """A model that lives on the host. A collective call of all ranks of the run.

    Args:
        chunks: The model's chunks on this rank.
        head: Its output head, if the loss reads it, for which it stays on the device.
    """
    stays = {id(head.tensors().weight)} if head is not None and head.model is not None else set()
    params = (p for chunk in chunks for p in chunk.parameters() if id(p) not in stays)
    # Data- and context-parallel replicas of these hold the same.
    part = (
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_expert_model_parallel_rank(),
        mpu.get_expert_tensor_parallel_rank(),
    )
    copy = HostCopy(params, torch.device(get_current_device()), part)
    logger.info(f'The teacher lives in {copy.memory}; {copy.bytes / 2**30:.2f} GiB come to the device with each visit.')
    return copy


class LocalTeacher:
    """A separate, frozen model.

    Args:
        args: ms-swift's arguments.
        chunks: The model's chunks on this rank.
        offload: Keep the weights on the host between its visits.
    """

    adapter = True
    description = 'a separate model'
    routing: RoutingReplay | None = None  # with --gkd_routing teacher, while it looks at a step of training

    def __init__(self, args, chunks: list[nn.Module], offload: bool = False):
        self.args, self.chunks = args, chunks
        self.head = self.loss_head = OutputHead(chunks)
        self.host_copy = host_copy(chunks, self.head) if offload else None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model in the state in which it teaches: on its device, no dropout, no recomputation, no gradient."""
        with ExitStack() as stack:
            if self.host_copy is not None:
                stack.enter_context(self.host_copy.on_device())
            for chunk in self.chunks:
                stack.enter_context(evaluation_mode(chunk))
            stack.enter_context(torch.no_grad())
            yield

    def signals(self, batches: InTurn, topk: TopKOptions | None = None) -> list[Signal | None]:
        """What the teacher says about the trained tokens of each micro-batch that are on this rank. A collective call.

        Args:
            topk: Reduce it to the k largest log-probabilities.

        Returns:
            One signal per micro-batch; None before the last stage.
        """
        with self.ready():
            found = self._states(batches)
            if self.head.model is None:
                return [None] * len(batches)
            head = None if topk else self._head_for_the_loss()
            return [self._reduced(states, topk) if topk else HiddenStates(states, head) for states in found]

    def _head_for_the_loss(self) -> OutputHead | HeadShard:
        """Called while the model teaches, on the last stage."""
        return self.loss_head

    def _states(self, batches: InTurn | list[Any]) -> list[torch.Tensor]:
        """Hidden states of each micro-batch, what :meth:`_kept` keeps of them; nothing before the last stage."""
        return get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=for_each_chunk(batches, len(self.chunks)),
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _forward_step(self, data_iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(data_iterator)
        view = local_view(self.args, batch.teacher_inputs or batch.student_inputs, batch.teacher_index, chunk.vp_stage)

        def chosen(states: torch.Tensor) -> torch.Tensor:
            return states.flatten(0, 1)[view.index][:, None]

        def collect(output: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            return self._kept(output[0], batch, view, chunk)

        routing = self.routing.recorded(chunk, batch) if self.routing is not None else nullcontext()
        with self.head.replaced(chosen, self.adapter), routing:
            return chunk(**view.inputs), collect

    def _kept(self, states: torch.Tensor, batch: MicroBatch, view: LocalView, chunk: nn.Module) -> torch.Tensor:
        """The states of the trained tokens that the loss needs on this rank.

        Args:
            states: [n_here, dim], of those that are on this rank under the teacher's prompt.
        """
        if batch.teacher_inputs is None:
            return states
        # Under its own prompt a token can lie on another context-parallel rank than under the student's.
        student = local_view(self.args, batch.student_inputs, batch.student_index, chunk.vp_stage)
        return student.of(view.whole(states))

    def _reduced(self, hidden: torch.Tensor, topk: TopKOptions, chunk_tokens: int = 256) -> TopK:
        """The k largest log-probabilities over all vocabulary shards, a chunk of tokens at a time."""
        logprobs = hidden.new_empty(len(hidden), topk.k, dtype=torch.float32)
        tail = hidden.new_empty(len(hidden), dtype=torch.float32)
        ids = torch.empty(len(hidden), topk.k, dtype=torch.int64, device=hidden.device)
        group, size = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_world_size()
        head = self.loss_head.tensors(self.adapter)
        first_id = mpu.get_tensor_model_parallel_rank() * len(head.weight)
        columns = min(max(topk.vocab_size - first_id, 0), len(head.weight))
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            softened = head.logits(hidden[rows])[:, :columns] / topk.temperature
            here = min(topk.k, columns)
            # [rows, k + 1]: the largest logits of this shard, and the logarithm of its mass.
            mine = softened.new_full((len(softened), topk.k + 1), -torch.inf)
            mine[:, :here], best = softened.topk(here, dim=-1)
            mine[:, -1] = softened.logsumexp(-1)
            mine_ids = torch.zeros_like(ids[rows])
            mine_ids[:, :here] = best + first_id
            values, value_ids = [mine], [mine_ids]
            if size > 1:
                values, value_ids = ([torch.empty_like(x) for _ in range(size)] for x in (mine, mine_ids))
                dist.all_gather(values, mine, group=group)
                dist.all_gather(value_ids, mine_ids, group=group)
            mass = torch.stack([x[:, -1] for x in values]).logsumexp(0)
            largest, place = torch.cat([x[:, :-1] for x in values], -1).topk(topk.k, dim=-1)
            logprobs[rows] = largest - mass[:, None]
            ids[rows] = torch.cat(value_ids, -1).gather(-1, place)
            # What is not listed, of this shard and then of all.
            listed = torch.where((ids[rows] >= first_id) & (ids[rows] < first_id + columns), ids[rows] - first_id, columns)
            padded = torch.nn.functional.pad(softened, (0, 1), value=-torch.inf).scatter_(-1, listed, -torch.inf)
            unlisted = [padded.logsumexp(-1)]
            if size > 1:
                unlisted = [torch.empty_like(mass) for _ in range(size)]
                dist.all_gather(unlisted, padded.logsumexp(-1), group=group)
            tail[rows] = torch.stack(unlisted).logsumexp(0) - mass
        return TopK(logprobs, ids, tail=tail)


class SharedBase(LocalTeacher):
    """The student's own base: one copy of the weights, the adapter off while it teaches.

    Raises:
        OptionError: Something outside the adapter is trained, which would move the teacher.
    """

    adapter = False
    description = "the student's base with its adapter off"
    is_reference = False

    def __init__(self, args, chunks: list[nn.Module]):
        super().__init__(args, chunks)
        check_frozen_base(chunks, self.description, self.is_reference)

    @contextmanager
    def ready(self) -> Iterator[None]:
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(adapters_off(chunk))
            with super().ready():
                yield


class Reference(SharedBase):
    """What ``--gkd_extrapolation`` moves the teacher away from. It looks at a step as the student sees it, after the teacher."""

    is_reference = True


class LiveStudent(LocalTeacher):
    """The student itself, as it is at this step; it teaches by what only its own prompt or images tell (``teacher_prompt``)."""

    description = 'the live student'


class AveragedStudent(TaughtByAverage, LocalTeacher):
    def _head_for_the_loss(self) -> OutputHead | HeadShard:
        head = self.head.tensors()
        if not head.weight.requires_grad:
            return self.head
        # The loss reads the teacher's head when the student's weights are back.
        bias = None if head.bias is None else head.bias.detach().clone()
        return HeadShard(HeadTensors(head.weight.detach().clone(), bias, head.transform))
