"""What a teacher that lives in the student's own model has computed already, and the student need not compute again.

A part of the model that nothing trains and no adapter sits in gives both of them the same: vision and audio towers with their projectors,
and the decoder layers below the first one that is trained or has an adapter. The teacher goes first; what these parts give is kept, and the
student's forward takes it from there. It takes the very tensors, so both see the same bits, and there is nothing to propagate back
through them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..step.samples import MicroBatch, Sample
from .head import language_model, unwrap_peft
from .zero3 import ranks_share_weights

AUDIO_INPUTS = ('input_features', 'feature_attention_mask')
MEDIA_INPUTS = ('pixel_values', 'pixel_values_videos', 'image_grid_thw', 'video_grid_thw', *AUDIO_INPUTS)

# What layers call the probability of a dropout that is a function, not a module.
DROPOUTS = ('dropout', 'attention_dropout', 'activation_dropout')


class SharedWork:
    """The parts of one model that teacher and student have in common.

    Args:
        model: The (PEFT) model without its wrapper, its trained parameters chosen.
        layers: Whether decoder layers may be left out: not if something else, a router's loss, needs what happens inside them.
    """

    def __init__(self, model: nn.Module, layers: bool = True):
        self._model = bare = unwrap_peft(model)
        arch = getattr(getattr(bare, 'model_meta', None), 'model_arch', None)
        names = [*getattr(arch, 'vision_tower', ()), *getattr(arch, 'aligner', ())]
        towers = [bare.get_submodule(name) for name in names if _has(bare, name)]
        inside = {id(m) for tower in towers for m in tower.modules() if m is not tower}
        self.towers = [tower for tower in towers if id(tower) not in inside and _is_fixed(tower)]
        self.layers = _lowest_layers(bare) if layers else []
        self._samples: list[Sample] | None = None  # of the micro-batch that the teacher saw; a copy on another device has the same list
        self._sharing: list[nn.Module] = []
        self._kept: dict[int, list[Any]] = {}

    def __bool__(self) -> bool:
        return bool(self.towers or self.layers)

    @cached_property
    def _in_step(self) -> bool:
        return ranks_share_weights(self._model)

    def _shared(self, batch: MicroBatch) -> list[nn.Module]:
        """The parts that see the same in both forwards of a micro-batch: of this rank, or of all of them if they run in step."""
        parts = [*self.towers, *self.layers]
        same = [True] * len(parts)
        if batch.teacher_inputs is not None:
            views = batch.student_inputs, batch.teacher_inputs
            different = {name for name in MEDIA_INPUTS if not _equal(*(view.get(name) for view in views))}
            same = [different.isdisjoint(_inputs_of(tower)) for tower in self.towers] + [False] * len(self.layers)
        if self._in_step and dist.get_world_size() > 1:
            everywhere = torch.tensor(same, dtype=torch.int32, device=batch.labels.device)
            dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
            same = everywhere.tolist()
        return [part for part, shared in zip(parts, same, strict=True) if shared]

    @contextmanager
    def kept(self, batch: MicroBatch) -> Iterator[None]:
        """Around the teacher's forward."""
        self._samples, self._sharing = batch.samples, self._shared(batch)
        self._kept = {id(module): [] for module in self._sharing}
        with ExitStack() as stack:
            for module in self._sharing:
                if module not in self.layers[:-1]:  # of the layers the last one's output is all that counts
                    stack.enter_context(forward_instead(module, self._keeping(module)))
            yield

    @contextmanager
    def used(self, batch: MicroBatch) -> Iterator[None]:
        """Around the student's forward, which uses nothing of another micro-batch. Afterwards nothing is kept."""
        try:
            with ExitStack() as stack:
                for module in self._sharing if batch.samples is self._samples else ():
                    stack.enter_context(_without_recomputation(module))
                    stack.enter_context(forward_instead(module, self._passing if module in self.layers[:-1] else self._using(module)))
                yield
        finally:
            self._samples, self._sharing, self._kept = None, [], {}

    def _keeping(self, module: nn.Module):
        forward, kept = module.forward, self._kept[id(module)]

        def keep(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            # Models write into what they are given: into a layer's output, or a field of a tower's.
            kept.append(output.clone() if isinstance(output, torch.Tensor) else copy.copy(output))
            return output

        return keep

    def _using(self, module: nn.Module):
        forward, kept = module.forward, self._kept[id(module)]

        def use(*args: Any, **kwargs: Any) -> Any:
            if not kept:
                return forward(*args, **kwargs)
            output = kept.pop(0)
            if module in self.layers and torch.is_grad_enabled():
                # A checkpointed layer that follows has a gradient only if one of its inputs asks for it. A model may write into that.
                return output.requires_grad_().clone()
            return output

        return use

    @staticmethod
    def _passing(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_fixed(module: nn.Module) -> bool:
    """Nothing in it is trained, switched off for the teacher, or random."""
    if any(p.requires_grad for p in module.parameters()):
        return False
    return not any(
        hasattr(m, '_disable_adapters') or (isinstance(m, nn.Dropout) and m.p > 0) or any(_probability(m, name) > 0 for name in DROPOUTS)
        for m in module.modules()
    )


def _probability(module: nn.Module, name: str) -> float:
    value = getattr(module, name, 0)
    return value if isinstance(value, int | float) else 0


def _inputs_of(tower: nn.Module) -> tuple[str, ...]:
    """The media that a tower may look at."""
    return AUDIO_INPUTS if getattr(tower, 'main_input_name', None) == 'input_features' else MEDIA_INPUTS


def _lowest_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers below the first one that differs, if nothing in front of them differs."""
    answers = language_model(model)
    decoder = answers.get_decoder() if hasattr(answers, 'get_decoder') else None
    layers = list(getattr(decoder, 'layers', ()))
    fixed = []
    for layer in layers:
        if not _is_fixed(layer):
            break
        fixed.append(layer)
    behind = [module for module in (*layers, getattr(decoder, 'norm', None), answers.get_output_embeddings()) if module is not None]
    behind = {id(m) for module in behind for m in module.modules()}
    in_front = [m for m in model.modules() if id(m) not in behind]
    changes = any(p.requires_grad for m in in_front for p in m.parameters(recurse=False)) or any(
        hasattr(m, '_disable_adapters') for m in in_front
    )
    return [] if changes else fixed


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is None and b is None


@contextmanager
def forward_instead(module: nn.Module, forward) -> Iterator[None]:
    before = module.__dict__.get('forward')
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _without_recomputation(module: nn.Module) -> Iterator[None]:
    """A backward pass must not run a forward again that was not run."""
    before = module.__dict__.get('gradient_checkpointing')
    if before:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        if before:
            module.gradient_checkpointing = before
