"""Which part of a micro-batch this rank holds: tokens are spread over context-parallel ranks, layers over pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from swift.megatron.trainers.utils import prepare_batch


@dataclass(frozen=True)
class LocalView:
    """One forward's inputs on this rank.

    Attributes:
        inputs: Keyword arguments of the model.
        index: [n_here] places, in the flattened [sequence, batch] of the model's hidden states, of those that predict a trained token;
            None before the last stage.
        here: [n] bool, which of the micro-batch's trained tokens these are.
    """

    inputs: dict[str, Any] = field(repr=False)
    index: torch.Tensor | None = field(repr=False)
    here: torch.Tensor | None = field(repr=False)

    def of(self, per_token: torch.Tensor) -> torch.Tensor:
        """The rows of a per-token tensor that belong to this rank."""
        return per_token[self.here.to(per_token.device)]

    def whole(self, states: torch.Tensor) -> torch.Tensor:
        """[n_here, dim] of each context-parallel rank -> [n, dim] of all of them."""
        if mpu.get_context_parallel_world_size() == 1:
            return states
        everything = states.new_zeros(len(self.here), states.shape[1])
        everything[self.here] = states
        dist.all_reduce(everything, group=mpu.get_context_parallel_group())
        return everything


def local_view(args, inputs: dict[str, Any], index: torch.Tensor, vp_stage: int | None = None) -> LocalView:
    """This rank's part of a micro-batch.

    Args:
        args: ms-swift's arguments.
        inputs: What the template's collator made, without labels.
        index: [n] positions in the flattened [batch, sequence] of the states that predict a trained token.
        vp_stage: Virtual stage of the chunk that runs.
    """
    batch, sequence = inputs['input_ids'].shape
    positions = torch.arange(batch * sequence).view(batch, sequence)
    # ms-swift shifts the labels by one and splits them as it splits the inputs. Ours are the positions' own numbers, shifted the other
    # way first, so that what comes back says which positions are here, whatever the layout.
    inputs = prepare_batch(args, {**inputs, 'labels': positions.roll(1, -1)}, vp_stage=vp_stage)
    held = inputs.pop('labels')
    if held is None:
        return LocalView(inputs, None, None)
    held = held.t().flatten()
    place = torch.full((batch * sequence,), -1, device=held.device)
    place[held] = torch.arange(len(held), device=held.device)
    places = place[index.to(held.device)]
    here = places >= 0
    return LocalView(inputs, places[here], here)
