"""A moving teacher: the exponential moving average of what the student trains (Tarvainen & Valpola, 2017, arXiv 1703.01780).

With an adapter the average costs an adapter, for everything else is shared with the student. It is kept in fp32, where a step's small
change is not rounded away, and each rank keeps the average of those values of the student that it holds itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..arguments import OptionError

FILE = 'gkd_teacher_average.safetensors'


def average_of(checkpoint: str | Path, name: str = FILE, option: str = '--resume_from_checkpoint', instead: str = '--adapters') -> Path:
    """Where a checkpoint has its average.

    Args:
        name: Of the file, or of the directory.
        option: By which the checkpoint was given, for the message.
        instead: The option with which only its weights are taken, for the message.

    Raises:
        OptionError: It has none.
    """
    path = Path(checkpoint) / name
    if not path.exists():
        raise OptionError(
            f'{option} {checkpoint}: there is no {name} in it, the average of a run with --gkd_self_teacher ema; start with {instead} '
            'instead.'
        )
    return path


class WholeParameters:
    """What a model trains, whole on each rank.

    Args:
        model: Prepared for training, without its wrapper.

    Attributes:
        params: The trained parameters by name.
        lends: Whether tensors that :meth:`replaced` has put into the model stay as they are when it ends.
    """

    lends = True

    def __init__(self, model: nn.Module):
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._modules = {id(m) for m in model.modules() if any(p.requires_grad for p in m.parameters())}

    def concern(self, module: nn.Module) -> bool:
        """Whether one of them is a parameter of this module of the model."""
        return id(module) in self._modules

    def held(self, name: str) -> torch.Tensor:
        """This rank's part of one, not a copy."""
        return self.params[name].data

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A tensor in the parameter's shape from every rank's part. A collective call."""
        return part

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`whole`."""
        return whole

    @contextmanager
    def replaced(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model computes with other values, in the dtype of its parameters. No gradient may be in flight."""
        students = {name: p.data for name, p in self.params.items()}
        try:
            for name, p in self.params.items():
                p.data = values[name].to(p.dtype, copy=True)
            yield
        finally:
            for name, p in self.params.items():
                p.data = students[name]


class SpreadParameters(WholeParameters, ABC):
    """What a model trains, a part of it on each rank, which gathers the others' where it computes."""

    lends = False

    @contextmanager
    def replaced(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        students = {name: self.held(name).clone() for name in self.params}
        try:
            self._write(values)
            yield
        finally:
            self._write(students)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        # Gathers have streams of their own, which wait for nothing but an optimizer's step, and read what lies on the host when they
        # get to it.
        _synchronize()
        for name in self.params:
            self.held(name).copy_(values[name])
        _synchronize()
        self._release()

    @abstractmethod
    def _release(self) -> None:
        """What has been gathered has other values: let it go, so that it is gathered anew where it is needed."""


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class ShardedParameters(SpreadParameters):
    """What a model trains, spread over ranks by FSDP2."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        # Activation checkpointing, FSDP's own, is in the names of the modules that it wraps.
        self.params = {name.replace('_checkpoint_wrapped_module.', ''): p for name, p in self.params.items()}
        self._groups = [m for m in model.modules() if isinstance(m, FSDPModule) and self.concern(m)]

    @torch.no_grad()
    def held(self, name: str) -> torch.Tensor:
        return self.params[name].to_local()

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        p = self.params[name]
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()).full_tensor()

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        p = self.params[name]
        return distribute_tensor(whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None).to_local()

    def _release(self) -> None:
        for group in self._groups:
            group.reshard()


class MovingAverage:
    """average <- decay * average + (1 - decay) * student, after each optimizer step.

    Args:
        decay: In [0, 1]; 1 keeps the values of the beginning.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.parameters: WholeParameters | None = None  # until training begins the average is the student
        self.values: dict[str, torch.Tensor] = {}

    def begin(self, parameters: WholeParameters) -> None:
        """The average of these, from their values of now on."""
        self.parameters = parameters
        self.values = {name: parameters.held(name).to(torch.float32, copy=True) for name in parameters.params}

    @torch.no_grad()
    def follow(self) -> None:
        for name, value in self.values.items():
            value.lerp_(self.parameters.held(name).float(), 1 - self.decay)

    def concerns(self, module: nn.Module) -> bool:
        """Whether one of the module's parameters is averaged."""
        return self.parameters is not None and self.parameters.concern(module)

    @contextmanager
    def in_place_of_the_student(self) -> Iterator[None]:
        """The model computes with the average, in the dtype of its parameters. No gradient may be in flight."""
        if self.parameters is None:
            yield
            return
        with self.parameters.replaced(self.values):
            yield


class TaughtByAverage:
    """The moving average of the student: with a back end's local teacher behind it, one that lives in the student's model.

    Args:
        model: What the local teacher is made of.
        average: Of the parameters that are trained.
    """

    description = 'the moving average of the student'

    def __init__(self, *model: Any, average: MovingAverage):
        super().__init__(*model)
        self.average = average

    @contextmanager
    def ready(self) -> Iterator[Any]:
        with self.average.in_place_of_the_student(), super().ready() as model:
            yield model


class AverageInOneFile(MovingAverage):
    """With a file in each checkpoint, whole, whatever the ranks."""

    def save(self, checkpoint: str | Path, writes: bool) -> None:
        """Write the average into a checkpoint. A collective call.

        Args:
            writes: Whether this rank writes it.
        """
        tensors = {}
        for name, value in self.values.items():
            whole = self.parameters.whole(name, value)
            if writes:
                tensors[name] = whole.cpu()
        if writes:
            Path(checkpoint).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(checkpoint) / FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Raises:
        OptionError: The checkpoint has no average, or that of other parameters.
        """
        with safe_open(average_of(checkpoint), 'pt') as file:
            check_same(f'--resume_from_checkpoint {checkpoint}: its {FILE}', set(file.keys()), set(self.values))
            for name, value in self.values.items():
                value.copy_(self.parameters.part(name, file.get_tensor(name)))


def check_same(whose: str, found: set[str], trained: set[str]) -> None:
    """
    Args:
        whose: The average of a checkpoint, for the message.
        found: Names of what it covers.
        trained: Names of what the student trains.

    Raises:
        OptionError: They differ.
    """
    different = found ^ trained
    if different:
        raise OptionError(
            f'{whose} has {len(found)} tensors and the student trains {len(trained)}, and only one of them has {min(different)}; resume '
            'with the options of the run that wrote it.'
        )
