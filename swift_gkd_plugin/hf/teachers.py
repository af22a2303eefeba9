"""Teachers of the transformers back end: a separate model, the student's base without or with another adapter, the student, its average.

Each says which model it is, in what state it has to be while it looks at the samples, and which output head belongs to it; the
forward itself is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..responses.local import evaluation_mode
from ..step.samples import MicroBatch
from ..teachers import HiddenStates, Logits, Signal, TopK, TopKOptions
from ..teachers.adapters import adapter_on, adapters_off, check_frozen_base
from ..teachers.average import TaughtByAverage
from ..teachers.offload import HostCopy, LayerStream
from .head import KeptHead, OutputHead
from .routing import RoutingReplay
from .shared_work import SharedWork
from .zero3 import ranks_share_weights

TEACHER_ADAPTER = 'gkd_teacher'  # PEFT's name for the teacher's adapter in the student's model


class LocalTeacher:
    """A separate, frozen model.

    Args:
        model: The prepared (wrapped) model.
        bare: The same without its wrapper.
        host_copy: Its weights, if they are on the host and visit the device.

    Attributes:
        adapter: Which adapter is on while it teaches (:meth:`OutputHead.executed`).
        shared_work: What it leaves to the student, if it lives in the student's model; None for nothing.
        routing: Where its choice of experts goes; None for nowhere.
    """

    adapter: bool | str = True
    description = 'a separate model'
    shared_work: SharedWork | None = None
    routing: RoutingReplay | None = None

    def __init__(self, model: nn.Module, bare: nn.Module, host_copy: HostCopy | LayerStream | None = None):
        self.model, self.bare, self.host_copy = model, bare, host_copy
        self.head = OutputHead(bare)

    @property
    def comes_once(self) -> bool:
        """Whether it is to look at a whole step's micro-batches in one visit."""
        return isinstance(self.host_copy, HostCopy)

    @cached_property
    def is_sharded(self) -> bool:
        return ranks_share_weights(self.bare)

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        """The model in the state in which it teaches: on its device, no dropout, no gradient checkpointing, no gradient."""
        with self.host_copy.on_device() if self.host_copy else nullcontext(), evaluation_mode(self.bare), torch.no_grad():
            yield self.model

    def signals(self, batches: Iterable[MicroBatch], forward: Callable[..., Any], topk: TopKOptions | None = None) -> list[Signal]:
        """What the teacher says about the n trained tokens of each micro-batch.

        Args:
            batches: On the device.
            forward: Calls a model with keyword arguments, in the template's forward context.
            topk: Reduce it to the k largest log-probabilities.
        """
        with self.ready() as model:
            found = []
            for batch in batches:
                with (
                    self.shared_work.kept(batch) if self.shared_work else nullcontext(),
                    self.routing.recorded(batch) if self.routing else nullcontext(),
                ):
                    found.append(self._signal(model, batch, forward, topk))
            return found

    def _signal(self, model: nn.Module, batch: MicroBatch, forward: Callable[..., Any], topk: TopKOptions | None) -> Signal:
        inputs = batch.teacher_inputs or batch.student_inputs

        def chosen(states: torch.Tensor) -> torch.Tensor:
            return states.reshape(-1, states.shape[-1])[batch.teacher_index.to(states.device)]

        if self.head.dense:
            found = Logits(chosen(forward(model, inputs).logits))
        else:
            heads, dtypes = [], []

            def chosen_with_head(states: torch.Tensor) -> torch.Tensor:
                hidden = self.head.operand(chosen(states), self.adapter)
                dtypes.append(hidden.dtype)
                heads.append(self._head_for_the_loss() if topk is None else self.head)
                return hidden

            with self.head.replaced(chosen_with_head, self.adapter):
                hidden = forward(model, inputs).logits
            found = HiddenStates(hidden.to(dtypes[0]), heads[0])  # in mixed precision they are upcast on the way out of a forward
        return found if topk is None else self._reduced(found, topk)

    def _head_for_the_loss(self) -> OutputHead | KeptHead:
        """Called in the forward of the head, where its tensors are whole."""
        return self.head

    def _reduced(self, found: HiddenStates | Logits, topk: TopKOptions, chunk_tokens: int = 256) -> TopK:
        """The k largest log-probabilities, a chunk of tokens at a time, so that the logits never exist as a whole."""
        hidden = isinstance(found, HiddenStates)
        states = found.hidden if hidden else found.logits
        logprobs = states.new_empty(len(states), topk.k, dtype=torch.float32)
        tail = states.new_empty(len(states), dtype=torch.float32)
        ids = torch.empty(len(states), topk.k, dtype=torch.int64, device=states.device)
        with self.head.gathered(self.adapter) if hidden else nullcontext():
            head = self.head.tensors(self.adapter) if hidden else None
            if hidden:  # once, not for each chunk
                head = replace(head, weight=head.weight.to(states.dtype))
            for start in range(0, len(states), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                logits = head.logits(states[rows].to(head.weight.device)) if hidden else states[rows].float()
                softened = torch.log_softmax(logits[:, : topk.vocab_size] / topk.temperature, -1)
                logprobs[rows], largest = softened.topk(topk.k, dim=-1)
                ids[rows] = largest  # which may be on another device
                tail[rows] = softened.scatter_(-1, largest, -torch.inf).logsumexp(-1)
        return TopK(logprobs, ids, tail=tail)


class SharedBase(LocalTeacher):
    """The student's own base: one copy of the weights, the adapter off while it teaches.

    Raises:
        OptionError: Something outside the adapter is trained, which would move the teacher.
    """

    adapter = False
    description = 'the base with the adapter off (frozen)'
    is_reference = False

    def __init__(self, model: nn.Module, bare: nn.Module):
        super().__init__(model, bare)
        check_frozen_base([bare], self.description, self.is_reference)

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        with adapters_off(self.bare), super().ready() as model:
            yield model


class Reference(SharedBase):
    """What ``--gkd_extrapolation`` moves the teacher away from. It sees what the student sees, right before the student does."""

    is_reference = True

    def beside(self, signal: Signal, batch: MicroBatch, forward: Callable[..., Any]) -> Signal:
        """What the teacher says about a micro-batch, with what the reference says. Args: as of :meth:`signals`."""
        (mine,) = self.signals([batch.as_student_sees()], forward)
        return replace(signal, reference=mine)


class AdapterOnBase(SharedBase):
    """The student's base with an adapter of the teacher's, frozen: one copy of the weights and one more adapter."""

    adapter = TEACHER_ADAPTER
    description = 'the base with --teacher_adapters (frozen)'

    def __init__(self, model: nn.Module, bare: nn.Module):
        super().__init__(model, bare)
        with adapter_on(bare, TEACHER_ADAPTER):
            self.head = OutputHead(bare)

    @contextmanager
    def ready(self) -> Iterator[nn.Module]:
        with adapter_on(self.bare, TEACHER_ADAPTER), LocalTeacher.ready(self) as model:
            yield model


class LiveStudent(LocalTeacher):
    """The student itself, as it is at this step; it teaches by what only its own prompt or images tell (``teacher_prompt``)."""

    description = 'the live student'


class AveragedStudent(TaughtByAverage, LocalTeacher):
    def _head_for_the_loss(self) -> OutputHead | KeptHead:
        if not self.average.concerns(self.head.executed(True)):
            return self.head
        # The loss reads the teacher's head when the student's weights are back.
        return KeptHead(self.head, self.head.tensors().detached(copy=not self.average.parameters.lends))
