"""The loss of a micro-batch, in the output head of a model of megatron-core, on vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import mpu

from ..divergence import Reference, TokenStats, linear_divergence
from ..step.objective import LossInForward
from ..step.samples import MicroBatch
from ..teachers import HiddenStates, Signal, TopK
from .head import HeadTensors, OutputHead
from .views import LocalView


class DistillationLoss(LossInForward):
    """The loss, for one student of megatron-core."""

    head: OutputHead

    def __call__(
        self, forward: Callable[[dict[str, Any]], Any], batch: MicroBatch, view: LocalView, signal: Signal | None, stats: TokenStats
    ) -> torch.Tensor:
        """Run this rank's part of the student and sum the loss over the tokens that are here.

        Args:
            forward: Runs the wrapped student on keyword arguments.
            signal: What the teacher says about the tokens that are here; None without a teacher.
            stats: Filled with per-token values.

        Returns:
            The sum (fp32, connected to the student's parameters even without a trained token); before the last stage, the model's output.
        """

        def in_head(states: torch.Tensor) -> torch.Tensor:
            return self._sum(states.flatten(0, 1)[view.index], batch, view, signal, stats).view(1, 1)

        with self.head.replaced(in_head):
            return forward(view.inputs)

    def _sum(self, chosen: torch.Tensor, batch: MicroBatch, view: LocalView, signal: Signal | None, stats: TokenStats) -> torch.Tensor:
        options, device = self.options, chosen.device
        head = self.head.tensors()
        alone = partial(self._alone, chosen, head)
        common = self._of_tokens(batch, lambda x: view.of(x).to(device), signal, stats, alone, partial(self._teacher_alone, signal))
        if signal is None or options.sampled:
            return alone(**common)
        common |= self._of_student(head)
        if isinstance(signal, TopK):
            return self._from_topk(chosen, head.weight, signal, **common)
        teacher = signal.head.tensors(self.teacher_adapter)
        if signal.reference is not None:
            its = signal.reference.head.tensors(False)
            how = (options.extrapolation, None if its.bias is None else its.bias.detach(), its.transform)
            common['reference'] = Reference(signal.reference.hidden, its.weight.detach(), *how)
        return self._run(
            linear_divergence,
            chosen,
            head.weight,
            signal.hidden,
            teacher.weight.detach(),
            options.divergence,
            teacher_bias=None if teacher.bias is None else teacher.bias.detach(),
            teacher_transform=teacher.transform,
            **common,
        )

    def _of_student(self, head: HeadTensors) -> dict[str, Any]:
        """A head as the operator's student has it, beside its weight."""
        return dict(
            student_bias=head.bias,
            student_transform=head.transform,
            vocab_size=self.options.vocab_size,
            vocab_group=mpu.get_tensor_model_parallel_group() if mpu.get_tensor_model_parallel_world_size() > 1 else None,
        )

    def _alone(self, states: torch.Tensor, head: HeadTensors, **common: Any) -> torch.Tensor:
        """The operator over one model."""
        return self._run(linear_divergence, states, head.weight, None, None, self.options.divergence, **self._of_student(head), **common)

    def _teacher_alone(self, signal: HiddenStates, **common: Any) -> torch.Tensor:
        return self._alone(signal.hidden, signal.head.tensors(self.teacher_adapter), **common)
