"""Frozen weights that live on the host and visit the device: a whole model at a time, or two of its layers.

There is one copy on the host, pinned where there is a GPU, and made once. On the way back nothing is copied, for the weights have not
changed: the parameters point at the host's copy again and the device's memory is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HostCopy:
    """Weights that come to the device together.

    Args:
        weights: Parameters, or the tensors in which a sharded model keeps this rank's part of them.
        device: Where they visit.

    Attributes:
        bytes: Of one visit.
        moved: Bytes that came to the device so far.
    """

    def __init__(self, weights: Iterable[torch.Tensor], device: torch.device):
        self.weights, self.device = list(weights), device
        self.copies = [_pinned(w.data) for w in self.weights]
        self.bytes = sum(w.numel() * w.element_size() for w in self.copies)
        self.moved = 0
        self.leave()

    def arrive(self) -> None:
        """Start the transfer, on the current stream."""
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.data = copy.to(self.device, non_blocking=True, copy=True)
        self.moved += self.bytes

    def leave(self) -> None:
        for weight, copy in zip(self.weights, self.copies, strict=True):
            weight.data = copy

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.arrive()
        try:
            yield
        finally:
            self.leave()


class LayerStream:
    """A model of which two layers at a time are on the device: one computes, the next is on its way.

    What is not in a layer (embeddings, norms, the output head) stays there. Each forward moves all layers once.

    Args:
        model: Frozen; nothing else may run it meanwhile.
        device: Where it computes.

    Raises:
        ValueError: The model has no list of layers.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        layers = repeated_layers(model)
        if not layers:
            raise ValueError(f'{type(model).__name__} has no list of layers that could be streamed')
        self.device = device
        self.copies = [HostCopy(layer.parameters(), device) for layer in layers]
        self.bytes = sum(copy.bytes for copy in self.copies)
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self._on_way: set[int] = set()
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, number=number: self._enter(number))
            layer.register_forward_hook(lambda module, args, output, number=number: self._exit(number), always_call=True)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [weight for copy in self.copies for weight in copy.weights]

    @property
    def moved(self) -> int:
        return sum(copy.moved for copy in self.copies)

    @property
    def present(self) -> int:
        """Layers on the device, or on their way."""
        return len(self._on_way)

    def _fetch(self, number: int) -> None:
        if number in self._on_way or number >= len(self.copies):
            return
        self._on_way.add(number)
        if self._stream is None:
            self.copies[number].arrive()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # memory that it gets may still be in use there
        with torch.cuda.stream(self._stream):
            self.copies[number].arrive()

    def _enter(self, number: int) -> None:
        self._fetch(number)
        if self._stream is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_stream(self._stream)
            for weight in self.copies[number].weights:
                weight.data.record_stream(compute)
        self._fetch(number + 1)

    def _exit(self, number: int) -> None:
        self.copies[number].leave()
        self._on_way.discard(number)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Around forwards; what an interrupted one has left on the device leaves."""
        try:
            yield
        finally:
            for number in list(self._on_way):
                self._exit(number)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that make up most of a model, in the order in which it has them: the members of its lists that transformers would never
    split over devices."""
    names = set(getattr(model, '_no_split_modules', None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [layer for one in lists for layer in one if type(layer).__name__ in names]


def _pinned(data: torch.Tensor) -> torch.Tensor:
    copy = data.detach().to('cpu')
    return copy.pin_memory() if torch.cuda.is_available() else copy
