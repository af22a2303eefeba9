"""A moving teacher: the exponential moving average of what the student trains (Tarvainen & Valpola, 2017, arXiv 1703.01780).

With an adapter the average costs an adapter, for everything else is shared with the student. It is kept in fp32, where a step's small
change is not rounded away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..arguments import OptionError

FILE = 'gkd_teacher_average.safetensors'


class MovingAverage:
    """average <- decay * average + (1 - decay) * student, after each optimizer step.

    Args:
        model: Whose trained parameters are averaged, from their values of now on. Parameters must be whole on this rank.
        decay: In [0, 1]; 1 keeps the values of now.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().float().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def follow(self) -> None:
        for name, p in self.params.items():
            self.values[name].lerp_(p.detach().float(), 1 - self.decay)

    def concerns(self, module: nn.Module) -> bool:
        """Whether one of the module's parameters is averaged."""
        mine = {id(p) for p in self.params.values()}
        return any(id(p) in mine for p in module.parameters())

    @contextmanager
    def in_place_of_the_student(self) -> Iterator[None]:
        """The model computes with the average, in the dtype of its parameters. No gradient may be in flight."""
        students = {name: p.data for name, p in self.params.items()}
        for name, p in self.params.items():
            p.data = self.values[name].to(p.dtype, copy=True)
        try:
            yield
        finally:
            for name, p in self.params.items():
                p.data = students[name]

    def save(self, checkpoint: str | Path) -> None:
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu() for name, value in self.values.items()}, Path(checkpoint) / FILE)

    def load(self, checkpoint: str | Path) -> None:
        """Raises:
        OptionError: The checkpoint has no average, or that of other parameters.
        """
        path = Path(checkpoint) / FILE
        if not path.exists():
            raise OptionError(
                f'--resume_from_checkpoint {checkpoint}: there is no {FILE} in it, the average of a run with --gkd_self_teacher ema; start '
                'with --adapters instead.'
            )
        found = load_file(path)
        if found.keys() != self.values.keys():
            raise OptionError(
                f'--resume_from_checkpoint {checkpoint}: its {FILE} has {len(found)} tensors and the student trains {len(self.values)}; '
                'resume with the options of the run that wrote it.'
            )
        for name, value in self.values.items():
            value.copy_(found[name])
