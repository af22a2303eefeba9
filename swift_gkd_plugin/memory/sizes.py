"""What a model is made of, counted on a model without memory (torch's device ``meta``), so whatever its architecture is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..responses.budget import bytes_per_token
from ..teachers.host_memory import Places
from ..teachers.offload import own_weights, repeated_layers

LAYER = re.compile(r'(?:^|\.)(?:layers|h|blocks)\.(\d+)\.')
TOWER = re.compile(r'(?:^|\.)(?:visual|vision\w*|audio\w*|image\w*|talker|code2wav|multi_modal\w*)\.')  # no part of the language model


@dataclass(frozen=True)
class Weight:
    """A parameter, without its values."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    trained: bool

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * self.itemsize

    @property
    def layer(self) -> int | None:
        """Of the language model; None outside of its layers."""
        found = LAYER.search(self.name)
        return int(found[1]) if found and not TOWER.search(self.name) else None


@dataclass(frozen=True)
class Inside:
    """What passes through the layers of a language model, in numbers per token.

    Attributes:
        layers: How many there are.
        hidden: Between them.
        queries, keys: Of all heads; there are as many values as keys.
        ffn: Inside of what a token goes through of a layer: of the experts that it is sent to, with experts.
        routed: Experts that it is sent to.
        vocab: Columns of the output head.
        itemsize: Bytes of a number.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    ffn: int
    routed: int
    vocab: int
    itemsize: int

    @classmethod
    def of(cls, config: Any, itemsize: int) -> Inside:
        """Args:
        config: Of transformers. What older or other families lack is taken as plain attention and four times the width.
        """
        text = config.get_text_config(decoder=True)

        def value(*names: str, default: int = 0) -> int:
            found = next((n for n in (getattr(text, name, None) for name in names) if n), default)
            return max(found) if isinstance(found, (list, tuple)) else found

        hidden, heads = value('hidden_size'), value('num_attention_heads', default=1)
        head = value('head_dim', 'qk_head_dim', default=hidden // heads)
        routed = value('num_experts_per_tok', 'num_experts_per_token', 'top_k_experts')
        ffn = value('intermediate_size', 'ffn_dim', 'n_inner', default=4 * hidden)
        if routed:
            ffn = routed * value('moe_intermediate_size', default=ffn) + value('shared_expert_intermediate_size')
        keys = head * value('num_key_value_heads', default=heads)
        return cls(value('num_hidden_layers'), hidden, head * heads, keys, ffn, routed, value('vocab_size'), itemsize)


@dataclass(frozen=True)
class ModelSize:
    """
    Attributes:
        weights: Each parameter once, tied ones too.
        inside: What passes through it.
        embedding, head: Names of the tables at both ends; equal where they are tied.
        cache: Bytes of the keys and values of a token; None if the configuration does not say.
        buffer: Bytes of the largest layer in a block of host memory (``--gkd_teacher_offload layer``); 0 without a list of layers.
        streamed: Names of the parameters that are in one layer only.
    """

    weights: tuple[Weight, ...]
    inside: Inside
    embedding: str
    head: str
    cache: int | None
    buffer: int
    streamed: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> ModelSize:
        """Args:
        model: Of transformers, with or without an adapter around it; its parameters may have no memory.
        """
        layers = repeated_layers(model)
        inside = own_weights(model, layers)
        names = {id(p): name for name, p in model.named_parameters()}
        tables = [getattr(m, 'weight', None) for m in (model.get_input_embeddings(), model.get_output_embeddings())]
        embedding, head = (names.get(id(table), '') for table in tables)
        dtype = next((p.dtype for name, p in model.named_parameters() if not p.requires_grad), None) or model.dtype
        return cls(
            tuple(Weight(name, tuple(p.shape), p.itemsize, p.requires_grad) for name, p in model.named_parameters()),
            Inside.of(model.config, dtype.itemsize),
            embedding,
            head,
            bytes_per_token(model),
            max((Places(weights).bytes for weights in inside), default=0),
            frozenset(names[id(p)] for weights in inside for p in weights),
        )

    @property
    def trained(self) -> list[Weight]:
        return [w for w in self.weights if w.trained]

    @property
    def bytes(self) -> int:
        return total(self.weights)

    @property
    def last_norm(self) -> str:
        """Its name: of the vectors outside of the layers, the last one."""
        return next((w.name for w in reversed(self.weights) if w.layer is None and len(w.shape) == 1 and not TOWER.search(w.name)), '')

    @property
    def trains_towers(self) -> bool:
        """Whether something is trained that only rows with media need: without a gradient it has no optimizer state either."""
        return any(w.trained and TOWER.search(w.name) for w in self.weights)

    @property
    def head_is_trained(self) -> bool:
        return any(w.trained and (w.name == self.head or 'lm_head' in w.name) for w in self.weights)

    @property
    def largest_layer(self) -> int:
        """Numbers of the largest layer, or of the largest table."""
        layers: dict[int, int] = {}
        for w in self.weights:
            if w.layer is not None:
                layers[w.layer] = layers.get(w.layer, 0) + w.numbers
        return max([*layers.values(), *(w.numbers for w in self.weights if w.layer is None)])

    def at_bits(self, bits: float) -> int:
        """Bytes with the matrices of the layers in so many bits, and half a bit for their scales: what quantisers do by default."""
        inside = [w for w in self.weights if w.layer is not None and len(w.shape) > 1]
        return self.bytes - total(inside) + math.ceil(sum(w.numbers for w in inside) * (bits + 0.5) / 8)

    def low_rank(self, rank: int) -> int:
        """Numbers of an adapter of this rank on all linear layers."""
        return sum(rank * sum(w.shape) for w in self.weights if w.layer is not None and len(w.shape) == 2)


def total(weights: Iterable[Weight]) -> int:
    return sum(w.bytes for w in weights)


def numbers(weights: Iterable[Weight]) -> int:
    return sum(w.numbers for w in weights)


def empty_model(args: Any, **which: Any) -> nn.Module:
    """A model of ms-swift's without memory, as the run will have it.

    Args:
        args: ms-swift's arguments.
        which: Which model, if it is not the student: ``model``, ``model_type``, ``revision``.
    """
    from swift.utils import disable_deepspeed_zero3, disable_safe_ddp_context_use_barrier

    with torch.device('meta'), disable_deepspeed_zero3(), disable_safe_ddp_context_use_barrier():
        return args.get_model_processor(return_dummy_model=True, **which)[0]


@contextmanager
def apart() -> Iterator[None]:
    """Around the building of models that nobody will train: no random number is drawn that the run would draw, and what ms-swift says about
    a model it says again when it builds the one that is trained."""
    from swift.utils import get_logger

    logger = get_logger()
    level = logger.level
    logger.setLevel('ERROR')
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.setLevel(level)
