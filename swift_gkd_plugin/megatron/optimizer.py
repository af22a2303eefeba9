"""What the student's optimizer keeps leaves for the host while a teacher that lives there visits.

Neither of the stock functions will do. That of ms-swift (4.6.0, megatron/trainers/utils.py: ``offload_megatron_optimizer``) leaves the fp32
weights of an optimizer that is not distributed, and all moments but Adam's, on the device. That of megatron-core (0.16.1,
optimizer/optimizer.py: ``offload_to_cpu``) gives parameters memory of their own: an optimizer of fp32 weights works on views of them, and
would no longer reach the model. So here, as megatron-core does with gradients, storages are emptied and filled again, under whatever views
there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from swift.utils import get_current_device, get_logger

from ..arguments import OptionError, teacher_offload
from ..metrics import Metrics
from ..teachers.host_memory import HostRoom, Places, Purpose
from ..world import from_all

logger = get_logger()
OPTIMIZER = Purpose('--gkd_optimizer_offload', 'optimizer', 'use false, or fewer ranks per machine')


class OptimizerState:
    """The fp32 weights and moments of this rank, on its device between two visits.

    Args:
        optimizer: megatron-core's, be it made of several.
        weights: The student's. What the optimizer has in their memory stays.
        device: Where the state is; what an optimizer keeps elsewhere stays there.
        moments: Bytes that will be kept of a number, beside its fp32 weight.
    """

    def __init__(self, optimizer: Any, weights: Iterable[torch.Tensor], device: torch.device, moments: int = 0):
        self.optimizers = [one.optimizer for one in getattr(optimizer, 'chained_optimizers', [optimizer])]
        self.weights, self.device = list(weights), device
        # Moments are there from the first update on, each from an aligned address.
        without = (p for one in self._there() if not one.state for group in one.param_groups for p in group['params'])
        to_come = sum(moments * p.numel() + 2 * Places.ALIGNMENT for p in without)
        self.room = HostRoom(OPTIMIZER, Places(map(_bytes_of, self.storages())).bytes + to_come)

    def _there(self) -> Iterator[torch.optim.Optimizer]:
        """A stage may have nothing to train."""
        return (one for one in self.optimizers if one is not None)

    def storages(self) -> list[torch.UntypedStorage]:
        """What leaves: all but single numbers, on this device, outside of the model's own memory."""
        of_model = {w.untyped_storage().data_ptr() for w in self.weights if _is_plain(w)}
        kept = itertools.chain.from_iterable(
            itertools.chain((p for group in one.param_groups for p in group['params']), *(state.values() for state in one.state.values()))
            for one in self._there()
        )
        found = {}
        for tensor in kept:
            if _is_plain(tensor) and tensor.dim() and tensor.device == self.device:
                storage = tensor.untyped_storage()
                if storage.nbytes() and storage.resizable() and storage.data_ptr() not in of_model:
                    found[storage.data_ptr()] = storage
        return list(found.values())

    @contextmanager
    def away(self, metrics: Metrics) -> Iterator[None]:
        """On the host, for as long as this lasts. Its bytes and both ways' seconds are booked."""
        with metrics.seconds('seconds/optimizer_offload'):
            storages = self.storages()
            sizes = [storage.nbytes() for storage in storages]
            copies = self.room.places(map(_bytes_of, storages))
            for storage, copy in zip(storages, copies, strict=True):
                copy.copy_(_bytes_of(storage), non_blocking=True)
            torch.cuda.synchronize()  # whatever has used the memory, on any stream, has been done
            for storage in storages:
                storage.resize_(0)
        try:
            yield
        finally:
            with metrics.seconds('seconds/optimizer_offload'):
                for storage, size, copy in zip(storages, sizes, copies, strict=True):
                    storage.resize_(size)
                    _bytes_of(storage).copy_(copy, non_blocking=True)
            metrics.add('optimizer/moved_gib', sum(sizes) / 2**30)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with memory of one piece; those of FP8 and the like are not."""
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def leaving_state(trainer: Any, foretold: bool, moments: int) -> OptimizerState | None:
    """The state of a trainer's optimizer, if it is to leave during visits; None if it stays. A collective call.

    Args:
        foretold: Whether it has to, by the memory model; an option that is given goes first.
        moments: As of :class:`OptimizerState`.

    Raises:
        OptionError: It was asked for, and a machine has too little memory.
    """
    args, asked = trainer.args, trainer.args.gkd_optimizer_offload
    visits = trainer.teacher_models is not None and teacher_offload(args) is not None and not args.optimizer_cuda_graph
    if not visits or not any(from_all(foretold if asked is None else asked)):
        return None
    weights = (p for chunk in trainer.unwrapped_models for p in chunk.parameters())
    state = OptimizerState(trainer.optimizer, weights, torch.device(get_current_device()), moments)
    try:
        state.room.check_fits()
    except OptionError as error:
        if asked:
            raise
        logger.warning(f'The optimizer stays on the device while the teacher visits, which may not fit. {error}')
        return None
    otherwise = '' if asked else '; --gkd_optimizer_offload false keeps it on the device'
    logger.info(f'While the teacher visits, the optimizer is in {state.room.bytes / 2**30:.2f} GiB of host memory{otherwise}.')
    return state
