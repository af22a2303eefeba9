"""Frozen weights that live on the host and visit the device: a whole model at a time, or two of its layers.

There is one copy on the host (:mod:`.host_memory`). On the way back nothing is copied, for the weights have not
changed: the parameters point at the host's copy again and the device's memory is free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .host_memory import HostMemory, Places


class HostCopy:
    """Weights that come to the device together.

    Args:
        weights: Parameters, or the tensors in which a sharded model keeps this rank's part of them.
        device: Where they visit.
        replica: As :class:`HostMemory`.

    Attributes:
        bytes: Of one visit.
        moved: Bytes that came to the device so far.
    """

    def __init__(self, weights: Iterable[torch.Tensor], device: torch.device, replica: Hashable = None):
        self.weights, self.device = list(weights), device
        self.memory = HostMemory([self.weights], replica)
        self.copies = self.memory.places[0].within(self.memory.blocks[0])
        self.bytes = sum(copy.nbytes for copy in self.copies)
        self.moved = 0

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

    Each forward moves all layers once, through two buffers of the size of the largest: what is on the device is bounded however far the
    host runs ahead of it. Streams decide when a buffer is overwritten, so nobody waits for the allocator or the host.

    What is not in a layer (embeddings, norms, the output head), is in several of them or is no parameter stays there.

    Args:
        model: Frozen; nothing else may run it meanwhile.
        device: Where it computes.
        replica: As :class:`HostMemory`.

    Attributes:
        bytes: Of one forward.
        moved: Bytes that came to the device so far.

    Raises:
        ValueError: The model has no list of layers.
    """

    def __init__(self, model: nn.Module, device: torch.device, replica: Hashable = None):
        layers = repeated_layers(model)
        if not layers:
            raise ValueError(f'{type(model).__name__} has no list of layers that could be streamed')
        self.device, self.moved = device, 0
        weights = own_weights(model, layers)
        self.memory = HostMemory(weights, replica)
        self._layers = [StreamedLayer(*layer) for layer in zip(weights, self.memory.places, self.memory.blocks, strict=True)]
        self.bytes = sum(layer.bytes for layer in self._layers)
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self._buffers: dict[int, Buffer] = {}  # by the number of a layer modulo 2, while the model visits
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, args, number=number: self._enter(number))
            layer.register_forward_hook(lambda module, args, output, number=number: self._exit(number), always_call=True)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [weight for layer in self._layers for weight in layer.weights]

    @property
    def present(self) -> int:
        """Layers on the device, or on their way."""
        return sum(buffer.number is not None for buffer in self._buffers.values())

    def _buffer(self, number: int) -> Buffer:
        """The one for this layer, made when it is first needed, of memory that work before on the current stream may still be using."""
        if number % 2 not in self._buffers:
            room = torch.empty(max(layer.block.numel() for layer in self._layers), dtype=torch.uint8, device=self.device)
            events = (None, None) if self._stream is None else (torch.cuda.Event(), torch.cuda.Event())
            self._buffers[number % 2] = Buffer(room, *events)
            self._free(self._buffers[number % 2])
        return self._buffers[number % 2]

    def _free(self, buffer: Buffer) -> None:
        """What reads it on the current stream has been queued; then it may be overwritten."""
        buffer.number = None
        if buffer.read is not None:
            buffer.read.record(torch.cuda.current_stream(self.device))

    def _fetch(self, number: int) -> None:
        if number >= len(self._layers):
            return
        buffer, layer = self._buffer(number), self._layers[number]
        if buffer.number == number:
            return
        if buffer.number is not None:  # a layer that was brought and left out
            self._exit(buffer.number)
        if self._stream is None:
            layer.arrive(buffer.room)
        else:
            self._stream.wait_event(buffer.read)
            with torch.cuda.stream(self._stream):
                layer.arrive(buffer.room)
                buffer.filled.record(self._stream)
        buffer.number = number
        self.moved += layer.bytes

    def _enter(self, number: int) -> None:
        self._fetch(number)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._buffer(number).filled)
        self._fetch(number + 1)

    def _exit(self, number: int) -> None:
        buffer = self._buffers.get(number % 2)
        if buffer is not None and buffer.number == number:
            self._layers[number].leave()
            self._free(buffer)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Around forwards; what an interrupted one has left on the device leaves, and so do the buffers."""
        try:
            yield
        finally:
            for buffer in self._buffers.values():
                if buffer.number is not None:
                    self._exit(buffer.number)
            if self._stream is not None:  # else the memory would have other uses while a layer that nobody has entered is on its way
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._buffers.clear()


class StreamedLayer:
    """The weights of a layer, which come to the device in one copy.

    Args:
        weights: In ``block``.
        places: Where each of them is in a block.
        block: Of host memory.
    """

    def __init__(self, weights: list[torch.Tensor], places: Places, block: torch.Tensor):
        self.weights, self.places, self.block = weights, places, block
        self.bytes = sum(w.nbytes for w in weights)

    def arrive(self, room: torch.Tensor) -> None:
        """Start the transfer, on the current stream."""
        room[: self.places.bytes].copy_(self.block, non_blocking=True)
        self._point_at(room)

    def leave(self) -> None:
        self._point_at(self.block)

    def _point_at(self, block: torch.Tensor) -> None:
        for weight, place in zip(self.weights, self.places.within(block), strict=True):
            weight.data = place


@dataclass
class Buffer:
    """Device memory in which layers take turns.

    Attributes:
        room: Its bytes.
        filled: The layer has come. None without streams.
        read: Whoever was there before has been computed with. None without streams.
        number: Of the layer that is there or on its way.
    """

    room: torch.Tensor
    filled: torch.cuda.Event | None
    read: torch.cuda.Event | None
    number: int | None = None


def own_weights(model: nn.Module, layers: list[nn.Module]) -> list[list[torch.Tensor]]:
    """Each layer's parameters, without those that another layer, or something outside of the layers, has too."""
    inside = {id(module) for layer in layers for module in layer.modules()}
    elsewhere = {id(p) for module in model.modules() if id(module) not in inside for p in module.parameters(recurse=False)}
    owners = Counter(id(p) for layer in layers for p in layer.parameters())
    return [[p for p in layer.parameters() if owners[id(p)] == 1 and id(p) not in elsewhere] for layer in layers]


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that make up most of a model, in the order in which it has them: the members of its lists that transformers would never
    split over devices. No layer is in another one, and none is there twice."""
    names = set(getattr(model, '_no_split_modules', None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = dict.fromkeys(layer for one in lists for layer in one if type(layer).__name__ in names)
    inside = {id(module) for layer in found for module in layer.modules() if module is not layer}
    return [layer for layer in found if id(layer) not in inside]
