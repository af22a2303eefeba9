"""``--gkd_routing teacher``: in training a student with routed experts sends its tokens to the experts that the teacher chose for them.

A router of transformers takes the ids of its experts from a ``torch.topk`` and makes their weights of its own scores at these ids. While
the student's router runs, that ``topk`` returns the teacher's ids and the student's scores at them. What the router does to those
afterwards, a renormalisation for instance, is the model's own code, and the gradient is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from ..arguments import OptionError
from ..step.samples import MicroBatch
from .head import unwrap_peft
from .shared_work import forward_instead


class RoutingReplay:
    """The teacher's choice of experts for one micro-batch at a time.

    Args:
        student, teacher: Models without their wrappers; they may be one.

    Raises:
        OptionError: A model has no routers that transformers knows of, or the two do not have the same ones.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self.student, self.teacher = _routers(student), _routers(teacher)
        mine, theirs = _experts(student), _experts(teacher)
        if not self.student:
            raise OptionError(f'--gkd_routing teacher: {type(unwrap_peft(student)).__name__} has no router whose choice can be replayed.')
        if len(self.student) != len(self.teacher) or mine != theirs:
            raise OptionError(
                f'--gkd_routing teacher: the student has {len(self.student)} routers with {mine} and the teacher {len(self.teacher)} with '
                f'{theirs}; the ids of one mean nothing to the other, leave the option out.'
            )
        self._ids: dict[int, torch.Tensor] = {}
        self._at: tuple[torch.Tensor, torch.Tensor] | None = None

    @contextmanager
    def recorded(self, batch: MicroBatch) -> Iterator[None]:
        """Around the teacher's forward. If it sees something else than the student, its choice counts where tokens are trained."""
        self._ids = {}
        self._at = None if batch.teacher_inputs is None else (batch.student_index, batch.teacher_index)
        with ExitStack() as stack:
            for number, router in enumerate(self.teacher):
                stack.enter_context(forward_instead(router, self._recording(number, router)))
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Around a micro-batch, its backward pass with what checkpointing computes again included. Afterwards nothing is kept."""
        try:
            with ExitStack() as stack:
                for number, router in enumerate(self.student):
                    stack.enter_context(forward_instead(router, self._replaying(number, router)))
                yield
        finally:
            self._ids, self._at = {}, None

    def _recording(self, number: int, router: nn.Module) -> Callable[..., Any]:
        forward = router.forward

        def record(*args: Any, **kwargs: Any) -> Any:
            with _Choice() as choice:
                outputs = forward(*args, **kwargs)
            if not isinstance(outputs, tuple) or not any(output is choice.ids for output in outputs):
                raise OptionError(f'--gkd_routing teacher: {type(router).__name__} does not return the ids of a torch.topk; leave it out.')
            self._ids[number] = choice.ids, choice.calls
            return outputs

        return record

    def _replaying(self, number: int, router: nn.Module) -> Callable[..., Any]:
        forward = router.forward

        def replay(*args: Any, **kwargs: Any) -> Any:
            if number not in self._ids:  # no teacher has looked: the start-up check of the heads
                return forward(*args, **kwargs)
            ids, call = self._ids[number]
            with _Choice(lambda own: self._chosen(own, ids), call):
                return forward(*args, **kwargs)

        return replay

    def _chosen(self, own: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        theirs = theirs.to(own.device)
        if self._at is None:
            return theirs
        mine, at = (index.to(own.device) for index in self._at)
        chosen = own.reshape(-1, own.shape[-1]).clone()
        chosen[mine] = theirs.reshape(-1, theirs.shape[-1])[at]
        return chosen.reshape(own.shape)


class _Choice(TorchFunctionMode):
    """Sees each ``torch.topk`` of a router; one of them may choose other ids.

    Args:
        other: From the ids that it chose, [tokens, k], to those that it is to return.
        call: Which call is meant. Groups of experts are chosen before the experts.

    Attributes:
        calls: So far.
        ids: Of the last one.
    """

    def __init__(self, other: Callable[[torch.Tensor], torch.Tensor] | None = None, call: int = 0):
        super().__init__()
        self.other, self.call = other, call
        self.calls, self.ids = 0, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return found
        self.calls += 1
        if self.calls == self.call:
            scores = args[0] if args else kwargs['input']
            ids = self.other(found.indices)
            found = torch.return_types.topk((scores.gather(-1, ids), ids))
        self.ids = found.indices
        return found


def _routers(model: nn.Module) -> list[nn.Module]:
    """The modules whose router logits transformers can record, in the model's order."""
    kinds = set()
    for module in model.modules():
        recorded = (module._can_record_outputs or {}).get('router_logits') if isinstance(module, PreTrainedModel) else None
        for one in recorded if isinstance(recorded, list) else [recorded]:
            kinds.add(one.target_class if isinstance(one, OutputRecorder) else one)
    kinds = tuple(kinds - {None})
    return [module for module in model.modules() if isinstance(module, kinds)]


def _experts(model: nn.Module) -> dict[str, Any]:
    """What the configuration says of experts."""
    config = unwrap_peft(model).config.get_text_config().to_dict()
    return {name: value for name, value in config.items() if 'expert' in name}
