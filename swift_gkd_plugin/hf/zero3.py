"""ZeRO-3: two forwards through one model, and other values in the place of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..teachers.average import SpreadParameters


def is_zero3(config: dict[str, Any] | None) -> bool:
    """Whether a configuration of DeepSpeed's, if there is one, shards parameters."""
    return bool(config) and config.get('zero_optimization', {}).get('stage') == 3


def ranks_share_weights(model: nn.Module) -> bool:
    """Whether ranks gather its parameters together (ZeRO-3, FSDP2), so that all of them have to run a part if one does."""
    return any(hasattr(p, 'ds_id') or isinstance(p, DTensor) for p in model.parameters())


def why_not_averaged(config: dict[str, Any] | None) -> str | None:
    """What in a configuration of DeepSpeed's leaves no place to exchange parameters in, with what to do about it; None if nothing does."""
    if not is_zero3(config):
        return None
    zero = config['zero_optimization']
    if (zero.get('offload_param') or {}).get('device') == 'nvme':
        return "ZeRO-3's offload_param on nvme: the parameters are not in memory; use cpu"
    if zero.get('zero_hpz_partition_size', 1) > 1:
        return f'zero_hpz_partition_size {zero["zero_hpz_partition_size"]}: ZeRO++ keeps a second copy of the student; use 1'
    return None


@contextmanager
def one_trace(engine: Any) -> Iterator[None]:
    """Around a forward after another one through the student's model: one trace for both and the student's backward pass.

    ZeRO-3 learns in which order modules run, from the start of one forward to the start of the next, in order to gather parameters ahead
    of time and to keep those that are needed again soon (``stage3_max_reuse_distance``). Two forwards before a backward pass make it
    learn the first one alone, and forget it where the student's backward pass begins, in every micro-batch.

    Args:
        engine: The student's DeepSpeed engine, of any stage.
    """
    offload = getattr(engine.optimizer, 'parameter_offload', None)  # only ZeRO-3's optimizer has one
    if offload is None:
        yield
        return
    coordinator = offload.get_param_coordinator()
    coordinator.reset_step = lambda: None  # DeepSpeed 0.19 calls it in a hook in front of the model
    try:
        yield
    finally:
        del coordinator.reset_step


@contextmanager
def gathered_for_generation(engine: Any) -> Iterator[None]:
    """All parameters of a ZeRO-3 model on every rank, brought together once, and not by each module for each token that it generates.

    As ``unwrap_model_for_generation`` of ms-swift does where the student is under ZeRO-3; at another model's stage it does not look.
    """
    import deepspeed
    from trl.models.utils import add_hooks, remove_hooks

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


class PartitionedParameters(SpreadParameters):
    """What a model trains, spread over ranks by ZeRO-3: each has an equal piece of a flat parameter, padded at the end.

    Args:
        model: Prepared for training, without its wrapper.
        engine: Its DeepSpeed engine.
    """

    def __init__(self, model: nn.Module, engine: Any):
        super().__init__(model)
        self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        self._owners = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]

    def held(self, name: str) -> torch.Tensor:
        return self.params[name].ds_tensor.data

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        p = self.params[name]
        pieces = torch.empty(p.ds_zero_partition_world_size * part.numel(), dtype=part.dtype, device=p.device)
        dist.all_gather_into_tensor(pieces, part.to(p.device), group=p.ds_process_group)
        return pieces[: p.ds_numel].view(p.ds_shape)

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        p, held = self.params[name], self.held(name)
        start = p.ds_zero_partition_rank * held.numel()
        mine = whole.flatten()[start : start + held.numel()]
        return torch.cat([mine, mine.new_zeros(held.numel() - mine.numel())])

    def _release(self) -> None:
        # Those that are on their way to this rank (prefetched) arrive first. The order of modules stays known.
        for owner in self._owners:
            self._coordinator.release_and_reset_all(owner)
