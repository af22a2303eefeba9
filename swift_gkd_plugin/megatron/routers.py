"""The auxiliary losses of routed experts: the balance of their load, and the z-loss.

A router has one for each micro-batch, which megatron-core multiplies by the tokens that a rank holds of it, prompts and fillers included,
while the gradient is divided by the trained tokens of the step (0.16.1, transformer/moe/router.py:456). So a coefficient would mean
something else for each data set and each layout. Here a micro-batch weighs as much as it has trained tokens, as in the transformers back
end, and a filler nothing.

What sequence and context parallelism add to packed rows, so that they can be cut, is no token of a row. megatron-core knows of padding
by an attention mask, which packed rows have none of, and would balance the experts over what was added as well. Where the embedding of
that token is zero, as it is in many models, gradients of 1e13 come of it.
"""

from __future__ import annotations

from typing import Any

import torch
from mcore_bridge.utils import split_cp_inputs
from megatron.core import mpu
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn


def leave_unweighed(chunks: list[nn.Module]) -> None:
    """The routers' losses are not multiplied by anything."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                module.calculate_per_token_loss = False


def leave_padding_out(chunks: list[nn.Module]) -> None:
    """What was added to packed rows counts in none of the routers' losses, and not in the load by which they are biased."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerBlock) and any(map(_looks_at_tokens, module.modules())):
                module.register_forward_pre_hook(_with_padding, with_kwargs=True)


def _looks_at_tokens(module: nn.Module) -> bool:
    if not isinstance(module, Router):
        return False
    config = module.config
    return module.is_aux_loss_enabled() or config.moe_z_loss_coeff is not None or config.moe_router_enable_expert_bias


def _with_padding(block: TransformerBlock, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    config, packed = block.config, kwargs.get('packed_seq_params')
    lengths = getattr(packed, 'seq_lens', None)  # of the rows themselves, by ms-swift
    if lengths is None or not (config.sequence_parallel or config.context_parallel_size > 1):
        return args, kwargs
    mask = padding_of(packed.cu_seqlens_q, lengths)[None]
    if config.context_parallel_size > 1:
        mask = split_cp_inputs(mask, packed.cu_seqlens_q, 1, cp_partition_mode=getattr(config, 'cp_partition_mode', 'zigzag'))
    if config.sequence_parallel:
        mask = mask.chunk(mpu.get_tensor_model_parallel_world_size(), dim=1)[mpu.get_tensor_model_parallel_rank()]
    return args, {**kwargs, 'padding_mask': mask.contiguous()}


def padding_of(ends: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[tokens] bool, which tokens of packed rows were added.

    Args:
        ends: [rows + added + 1], where each row begins, with what was added to it, then each sequence that was added, and the end of all.
        lengths: [rows], of the rows themselves.
    """
    places = torch.arange(int(ends[-1]), device=ends.device)
    row = torch.bucketize(places, ends[1:], right=True)
    lengths = nn.functional.pad(lengths.to(ends), (0, len(ends) - 1 - len(lengths)))
    return places - ends[row] >= lengths[row]


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
