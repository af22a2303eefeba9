"""The base of a model that has PEFT's adapters in it, without any of them or with another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import OptionError


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, without PEFT's ``disable_adapter()``.

    That toggles ``requires_grad`` too. Under FSDP2 the toggle lands on unsharded parameters, and a trained head of
    ``modules_to_save`` silently stops training (peft 0.20, ``utils/other.py:662``). The flag alone decides what a forward computes.
    """
    with _layers_with(model, '_disable_adapters', True):
        yield


@contextmanager
def adapter_on(model: nn.Module, name: str) -> Iterator[None]:
    """The base model with one adapter, without PEFT's ``set_adapter()``, which toggles ``requires_grad`` as well."""
    with _layers_with(model, '_active_adapter', [name]):
        yield


@contextmanager
def _layers_with(model: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    layers = _layers(model, attribute)
    before = [getattr(layer, attribute) for layer in layers]
    for layer in layers:
        setattr(layer, attribute, value)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            setattr(layer, attribute, old)


def _layers(model: nn.Module, attribute: str) -> list[nn.Module]:
    """PEFT's layers, by what they have of their own; not wrappers that pass a lookup on to the layer inside."""
    return [m for m in model.modules() if attribute in vars(m) or hasattr(type(m), attribute)]


def add_frozen_adapter(model: nn.Module, path: str | Path, name: str) -> None:
    """Load a second adapter into a PEFT model. What is trained and which adapter is active stay as they are."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    training = model.training
    model.load_adapter(str(path), name)
    for p in model.parameters():  # PEFT freezes the first adapter with the second one
        p.requires_grad_(id(p) in trained)
    model.train(training)


def trained_outside_adapters(model: nn.Module) -> list[str]:
    """Names of the trained parameters that no adapter holds: with it off they are still there."""
    held: set[int] = set()
    for layer in _layers(model, '_disable_adapters'):
        bases = [base for name in ('base_layer', 'original_module') if (base := layer._modules.get(name)) is not None]
        held |= {id(p) for p in layer.parameters()} - {id(p) for base in bases for p in base.parameters()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def check_frozen_base(models: Iterable[nn.Module], description: str, is_reference: bool = False) -> None:
    """
    Args:
        models: What this rank holds of a model whose base teaches while it is trained.
        description: Of the teacher, for the message.
        is_reference: Whether the base is the reference of ``--gkd_extrapolation`` instead.

    Raises:
        OptionError: Something outside the adapter is trained, which would move the base.
    """
    who, instead = ('teacher', 'give --teacher_model another copy of the base')
    if is_reference:
        who, instead = ('reference', 'leave --gkd_extrapolation out')
    moving = [name for model in models for name in trained_outside_adapters(model)]
    if moving:
        raise OptionError(
            f'The {who} is {description}, but {len(moving)} parameters outside the adapter are trained, {moving[0]} for one; '
            f'freeze them, or {instead}.'
        )


def adapter_has_effect(model: nn.Module) -> bool:
    """Whether the adapter changes the model at the start. A fresh LoRA has B = 0; of other tuners that can't be told."""
    b = [getattr(p, 'ds_tensor', p) for name, p in model.named_parameters() if 'lora_B' in name]
    return not b or any(p.detach().any().item() for p in b)
