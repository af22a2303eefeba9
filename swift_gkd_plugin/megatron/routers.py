"""The auxiliary losses of routed experts: the balance of their load, and the z-loss.

A router has one for each micro-batch, which megatron-core multiplies by the tokens that a rank holds of it, prompts and fillers included,
while the gradient is divided by the trained tokens of the step (0.16.1, transformer/moe/router.py:456). So a coefficient would mean
something else for each data set and each layout. Here a micro-batch weighs as much as it has trained tokens, as in the transformers back
end, and a filler nothing.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from torch import nn


def leave_unweighed(chunks: list[nn.Module]) -> None:
    """The routers' losses are not multiplied by anything."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                module.calculate_per_token_loss = False


def weigh(output: torch.Tensor, tokens: int, config) -> None:
    """Give the routers' losses of one chunk and one micro-batch their weight when their backward pass begins: by then the schedule may be
    further, and layers that are computed again run inside of it.

    Args:
        output: Of the chunk.
        tokens: Trained ones of the whole micro-batch, of which ranks that share it have a part of the losses each.
        config: Of the model.
    """
    if config.num_moe_experts is None or not output.requires_grad:
        return

    def before(gradient: torch.Tensor) -> None:
        scale = torch.ones(1, device=gradient.device)
        MoEAuxLossAutoScaler.set_loss_scale(tokens * (scale if config.grad_scale_func is None else config.grad_scale_func(scale)))

    output.register_hook(before)
