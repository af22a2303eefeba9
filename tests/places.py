"""Tensors of one CPU as if they were on several devices: what would fail on two GPUs, or for float64 on MPS, fails here."""

from __future__ import annotations

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

HOST = torch.device('cpu')
DEVICE = torch.Tensor.device.__get__
COPIES = (torch.Tensor.copy_, torch.Tensor.__setitem__)


def place_of(tensor: torch.Tensor) -> torch.device:
    return tensor.__dict__.get('place', HOST)


def put(tensor: torch.Tensor, place: torch.device) -> None:
    tensor.__dict__['place'] = place


class Places(TorchFunctionMode):
    """Results are where their operands are, and operands that are in two places raise. Only a scalar and an index may be on the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == DEVICE:
            return place_of(args[0])
        device = kwargs.pop('device', None)
        if func is torch.Tensor.to:
            return self._moved(device, *args, **kwargs)
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = {place_of(x) for x in operands if not self._may_be_elsewhere(func, x, operands[0])} or set(map(place_of, operands))
        if len(places) > 1 and func not in COPIES:
            raise RuntimeError(f'Expected all tensors to be on the same device, but found {sorted(map(str, places))} in {func}')
        found = func(*args, **kwargs)
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor):
                place = place_of(operands[0]) if func in COPIES else torch.device(device or next(iter(places), HOST))
                self._check_dtype(x, place)
                put(x, place)
        return found

    @staticmethod
    def _check_dtype(tensor: torch.Tensor, place: torch.device) -> None:
        if place.type == 'mps' and tensor.dtype == torch.float64:
            raise TypeError("The MPS framework doesn't support float64")

    @staticmethod
    def _may_be_elsewhere(func, tensor: torch.Tensor, first: torch.Tensor) -> bool:
        return place_of(tensor) == HOST and (not tensor.dim() or (func is torch.Tensor.__getitem__ and tensor is not first))

    def _moved(self, device, tensor: torch.Tensor, *rest, **kwargs) -> torch.Tensor:
        other = [x for x in rest if isinstance(x, torch.device | str | torch.Tensor)]
        rest = [x for x in rest if not isinstance(x, torch.device | str | torch.Tensor)]
        device = other[0] if other else device
        place = place_of(device) if isinstance(device, torch.Tensor) else torch.device(device or place_of(tensor))
        found = tensor.to(*rest, **kwargs) if rest or 'dtype' in kwargs else tensor
        if found is tensor and place != place_of(tensor):
            found = tensor.clone()
        self._check_dtype(found, place)
        put(found, place)
        return found


class _Hook(AlignDevicesHook):
    def init_hook(self, module):
        return module  # its weights are in their place


def spread(model: nn.Module, places: dict[str, torch.device]) -> nn.Module:
    """As accelerate's ``dispatch_model`` would: parts by name, and what they need comes to them."""
    for name, place in places.items():
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            put(tensor, place)
        add_hook_to_module(module, _Hook(place), append=True)
    add_hook_to_module(model, _Hook(next(iter(places.values())), io_same_device=True), append=True)
    return model
