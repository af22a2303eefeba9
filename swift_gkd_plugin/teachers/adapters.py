"""The base of a model that has PEFT's adapters in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, without PEFT's ``disable_adapter()``.

    That toggles ``requires_grad`` too. Under FSDP2 the toggle lands on unsharded parameters, and a trained head of
    ``modules_to_save`` silently stops training (peft 0.20, ``utils/other.py:662``). The flag alone decides what a forward computes.
    """
    layers = [m for m in model.modules() if '_disable_adapters' in vars(m) or hasattr(type(m), '_disable_adapters')]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag
