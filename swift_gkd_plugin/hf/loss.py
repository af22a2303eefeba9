"""The loss of a micro-batch, in the output head of a model of transformers or as whole logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from ..divergence import Reference, TokenStats, linear_divergence, logits_divergence
from ..step.objective import LossInForward
from ..step.samples import MicroBatch
from ..teachers import HiddenStates, Logits, Signal, TopK
from .head import HeadTensors, OutputHead


class DistillationLoss(LossInForward):
    """The loss, for one student of transformers."""

    head: OutputHead

    def __call__(
        self, forward: Callable[[dict[str, Any]], Any], batch: MicroBatch, signal: Signal | None, stats: TokenStats
    ) -> tuple[torch.Tensor, Any]:
        """Run the student and sum the loss over the micro-batch's tokens.

        Args:
            forward: Runs the wrapped student on keyword arguments.
            batch: On the device.
            signal: What the teacher says; None without a teacher.
            stats: Filled with per-token values.

        Returns:
            The sum (a scalar in fp32, connected to the student's parameters even without a trained token), and the model's output.
        """

        def in_head(states: torch.Tensor) -> torch.Tensor:
            chosen, head = states.reshape(-1, states.shape[-1])[batch.student_index.to(states.device)], None
            if not self.head.dense:
                head = self.head.tensors()
                # accelerate's hook, which would move them, is on the forward that this one replaces.
                chosen = self.head.operand(chosen).to(head.weight.device)
            with torch.autocast(states.device.type, enabled=False):
                return self._sum(chosen, head, batch, signal, stats)

        if self.head.dense:
            outputs = forward(batch.student_inputs)
            return in_head(outputs.logits), outputs
        with self.head.replaced(in_head):
            outputs = forward(batch.student_inputs)
        return outputs.logits, outputs

    def _sum(
        self, chosen: torch.Tensor, head: HeadTensors | None, batch: MicroBatch, signal: Signal | None, stats: TokenStats
    ) -> torch.Tensor:
        """``chosen`` [n, dim] hidden states, or [n, vocab] logits if ``head`` is None; all else comes to their device."""
        options, device = self.options, chosen.device
        alone = partial(self._alone, chosen, head)
        common = self._of_tokens(batch, lambda x: x.to(device), signal, stats, alone, partial(self._teacher_alone, signal, device))
        if signal is None or options.sampled:
            return alone(**common)
        common |= self._vocabulary
        student = {} if head is None else of_student(head)
        if isinstance(signal, TopK):
            return self._from_topk(chosen, None if head is None else head.weight, signal, **student, **common)
        base = signal.reference
        if head is None or isinstance(signal, Logits):
            logits = chosen if head is None else head.logits_with_gradient(chosen)
            if base is not None:
                common['reference'] = Reference(self._logits(base, False, device), None, options.extrapolation)
            return self._run(logits_divergence, logits, self._logits(signal, self.teacher_adapter, device), options.divergence, **common)
        with self._whole((signal.head, self.teacher_adapter), *([] if base is None else [(base.head, False)])):
            teacher = signal.head.tensors(self.teacher_adapter).detached(device)
            if base is not None:
                its = base.head.tensors(False).detached(device)
                how = (options.extrapolation, its.bias, its.transform, its.lora)
                common['reference'] = Reference(base.hidden.to(device), its.weight, *how)
            return self._run(
                linear_divergence,
                chosen,
                head.weight,
                signal.hidden.to(device),
                teacher.weight,
                options.divergence,
                teacher_bias=teacher.bias,
                teacher_transform=teacher.transform,
                teacher_lora=teacher.lora,
                **student,
                **common,
            )

    @property
    def _vocabulary(self) -> dict[str, int | None]:
        """Also where no teacher looks at the tokens: their log-probabilities are compared with others'."""
        return dict(vocab_size=self.options.vocab_size) if self.options.weight > 0 else {}

    def _alone(self, states: torch.Tensor, head: HeadTensors | None, **common: Any) -> torch.Tensor:
        """The operator over one model."""
        common |= self._vocabulary
        if head is None:
            return self._run(logits_divergence, states, None, self.options.divergence, **common)
        return self._run(linear_divergence, states, head.weight, None, None, self.options.divergence, **of_student(head), **common)

    def _teacher_alone(self, signal: HiddenStates | Logits, device: torch.device, **common: Any) -> torch.Tensor:
        if isinstance(signal, Logits):
            return self._alone(signal.logits.to(device), None, **common)
        with self._whole((signal.head, self.teacher_adapter)):
            return self._alone(signal.hidden.to(device), signal.head.tensors(self.teacher_adapter).detached(device), **common)

    @contextmanager
    def _whole(self, *heads: tuple[OutputHead, bool | str]) -> Iterator[None]:
        """Heads of teachers, each with its adapter, with whole weights. If one is the module whose forward this is, they are whole
        already, and ZeRO-3 would refuse to partition them again before that forward ends."""
        whole = set() if self.head.dense else {self.head.executed(adapter=True)}
        with ExitStack() as stack:
            for head, adapter in heads:
                if head.executed(adapter) not in whole:
                    stack.enter_context(head.gathered(adapter))
                    whole.add(head.executed(adapter))
            yield

    def _logits(self, signal: HiddenStates | Logits, adapter: bool | str, device: torch.device) -> torch.Tensor:
        if isinstance(signal, Logits):
            return signal.logits.to(device)
        with torch.no_grad(), self._whole((signal.head, adapter)):
            head = signal.head.tensors(adapter)
            return head.logits(signal.hidden.to(head.weight.device)).to(device)


def of_student(head: HeadTensors) -> dict[str, Any]:
    """A head as the operator's student has it, beside its weight."""
    return dict(student_bias=head.bias, student_transform=head.transform, student_lora=head.lora)
