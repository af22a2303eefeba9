"""The output head belongs to the loss, as in ``hf/head.py``: the head module returns something else while the forward runs.

Megatron's head is split over the tensor-parallel ranks, each with consecutive rows of the vocabulary, and stays so. With sequence
parallelism its input is split over the same ranks, and is gathered here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from mcore_bridge.model import GPTModel
from mcore_bridge.model.mm_gpts.gemma4 import Gemma4TextGPTModel
from mcore_bridge.model.mm_gpts.muse_glimmer import MuseGlimmerTextGPTModel
from megatron.core import mpu
from megatron.core.extensions.transformer_engine import TELinear
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from ..arguments import OptionError
from ..divergence import LogitTransform, linear_logits


def _capped(config: Any) -> LogitTransform | None:
    cap = config.final_logit_softcapping
    return None if cap is None else LogitTransform(softcap=cap)


def _scaled_and_capped(config: Any) -> LogitTransform | None:
    cap = config.final_logit_softcapping
    return None if cap is None else LogitTransform(config.output_multiplier, cap)  # without a cap the bridge leaves the scale out too


# What models do to their logits after the head, by their method that does it, from the text model's configuration: all of mcore-bridge
# 1.6.5 that have one of their own.
POST_PROCESSING: dict[Callable[..., Any], Callable[[Any], LogitTransform | None]] = {
    Gemma4TextGPTModel._forward_output_layer: _capped,
    MuseGlimmerTextGPTModel._forward_output_layer: _scaled_and_capped,
}


@dataclass(frozen=True)
class HeadTensors:
    """This rank's rows of an output head: logits = transform(hidden @ weight.T + bias)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, dim] -> [n, rows] in fp32 from inputs of any precision; for a few tokens, and without a gradient."""
        return linear_logits(hidden, self.weight, bias=self.bias, transform=self.transform)


@dataclass(frozen=True)
class HeadShard:
    """A teacher's output head as the loss reads it, where that is not the one that it computes with: in the student's layout, or as it was
    when the teacher looked."""

    shard: HeadTensors | None

    def tensors(self, adapter: bool = True) -> HeadTensors:
        return self.shard


def mark_shards(chunks: list[nn.Module]) -> None:
    """Say of each weight whether tensor-parallel ranks have parts of it or copies, for the gradient's norm, by which gradients are clipped.

    megatron-core says so of embeddings and output heads where it initialises them, which Megatron-SWIFT leaves out, for it loads them:
    the parts of all ranks but the first would not count (megatron-core 0.16.1, tensor_parallel/layers.py:244, 855). Transformer Engine
    takes every linear layer for split, LoRA's copied halves among them: each copy would count.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear):
                weight = module.weight  # None where the head is the embedding
                if weight is not None and not hasattr(weight, 'tensor_model_parallel'):
                    set_tensor_model_parallel_attributes(weight, True, 0, 1)
            elif type(module) is TELinear and module.parallel_mode is None:
                for parameter in module.parameters(recurse=False):
                    parameter.tensor_model_parallel = False


class OutputHead:
    """The output head of one model, on the ranks of the last pipeline stage.

    Args:
        chunks: The model's chunks on this rank, without wrappers: one, or several with virtual pipeline stages.

    Attributes:
        transform: What the model does to its logits after the head; None if nothing.

    Raises:
        OptionError: The model does something to its logits that the operator would miss.
    """

    def __init__(self, chunks: list[nn.Module]):
        self.config = chunks[0].config
        self.model = next((getattr(m, 'language_model', m) for m in chunks if m.post_process), None)
        own_way = getattr(type(getattr(chunks[0], 'language_model', chunks[0])), '_forward_output_layer', None)
        self.changes_logits = own_way not in (None, GPTModel._forward_output_layer)
        if self.changes_logits and own_way not in POST_PROCESSING:
            raise OptionError(
                f'{type(chunks[0]).__name__} changes its logits after the output head in a way that is not in the list; train it with '
                '`swift rlhf`.'
            )
        # By the configuration, which stages without a head have too.
        self.transform = POST_PROCESSING[own_way](self.config.hf_config.get_text_config()) if self.changes_logits else None

    @property
    def columns(self) -> int:
        """Rows of the whole head, without those that fill up the last shard."""
        return self.config.padded_vocab_size

    def executed(self, adapter: bool) -> nn.Module:
        """The module whose forward runs: PEFT's ``modules_to_save`` keeps the trained copy and the original side by side."""
        module = self.model.output_layer
        if not hasattr(module, 'modules_to_save'):
            return module
        return module.modules_to_save['default'] if adapter else module.original_module

    def tensors(self, adapter: bool = True) -> HeadTensors:
        executed = self.executed(adapter)
        tied = self.model.share_embeddings_and_output_weights
        weight = self.model.shared_embedding_or_output_weight() if tied else executed.weight
        return HeadTensors(weight, executed.bias, self.transform)

    @contextmanager
    def replaced(self, forward: Callable[[torch.Tensor], torch.Tensor], adapter: bool = True) -> Iterator[None]:
        """Let the head return ``forward(hidden)`` instead of logits; nothing happens where this rank has no head.

        Args:
            forward: Takes the head's whole input [sequence, batch, dim] and returns [a, b, …], which the model hands out as [b, a, …].
            adapter: Whether the adapter is on in this forward.
        """
        if self.model is None:
            yield
            return
        executed = self.executed(adapter)

        def instead(hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
            if self.config.sequence_parallel:
                # Every rank's loss is that of the whole vocabulary, so its gradient is whole too and not to be summed over the ranks.
                hidden = gather_from_sequence_parallel_region(
                    hidden, tensor_parallel_output_grad=False, group=mpu.get_tensor_model_parallel_group()
                )
            return forward(hidden), None

        executed.forward = instead
        if self.changes_logits:  # what comes back are none
            self.model._forward_output_layer = MethodType(GPTModel._forward_output_layer, self.model)
        try:
            yield
        finally:
            del executed.forward
            if self.changes_logits:
                del self.model._forward_output_layer
