"""What a back end is to the step: what only it can do. Who reads this file can write another one.

The :class:`~swift_gkd_plugin.step.conductor.Conductor` brings the rows of an optimizer step to micro-batches with responses, counts and the
teacher's signals. The back end then runs them through its own loop, accelerate's or megatron-core's, and books each with
:meth:`Conductor.add_loss`. Building models, wrapping them, laying them out over ranks and stopping at the output head are no business of
the step. The loop around it is in docs_en/architecture.md, "Writing another back end".
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..responses import Prompt, Response, SamplingOptions
from ..sources import Source
from ..teachers import Signal
from .balance import Balancing
from .random_state import RandomState
from .ranks import Ranks
from .samples import Counted, InTurn, Sample
from .teaching import TeacherBatches


class Backend(ABC):
    """Every abstract method that is not a property is a collective call: all ranks make it, in the same order, some of them with nothing.

    Attributes:
        args: ms-swift's arguments with the fields of :class:`~swift_gkd_plugin.arguments.GKDOptions`.
        ranks: Who works on which rows.
        learning_rate: The option to lower when a loss is not finite.
        saves_only_weights: A checkpoint keeps nothing that a resumed run needs.
        multiple: :meth:`run` takes a multiple of so many micro-batches.
    """

    args: Any
    ranks: Ranks
    learning_rate = '--learning_rate'
    saves_only_weights = False
    multiple = 1

    @property
    @abstractmethod
    def step(self) -> int:
        """Optimizer steps that are done."""

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def is_last_step(self) -> bool:
        """Whether the run ends with the step that is under way."""
        return self.step + 1 >= self.num_steps

    @property
    @abstractmethod
    def state(self) -> Any:
        """The host's own account of the run, which reward functions are given."""

    def random_state(self) -> RandomState:
        """The random numbers of a training step, as they are now, with a method ``restore``."""
        return RandomState(self.ranks.device)

    @abstractmethod
    def ending_ids(self) -> list[int]:
        """The ids that end an answer: those of the student's generation config, brought in line with the template."""

    @abstractmethod
    def generate(self, source: Source, prompts: list[Prompt], seeds: list[int], options: SamplingOptions) -> list[Response]:
        """Answer prompts in the training processes, with the student or a local teacher.

        Args:
            prompts: Ranks with the same rows give the same ones.
            seeds: One per prompt; a response depends on no other prompt.
        """

    @abstractmethod
    def roll_out(self, samples: list[Sample]) -> None:
        """The student answers by its engine; what was asked for ahead is collected. Sets ``generated`` and ``response`` of each sample."""

    @abstractmethod
    def roll_out_ahead(self, samples: list[Sample]) -> None:
        """Have the engine's server begin with these, from the weights of now. Some rank has one."""

    @property
    def balancing(self) -> Balancing | None:
        """How the rows of a step are arranged anew in micro-batches when their responses are there; None if they stay as they came."""
        return None

    @abstractmethod
    def teacher_batches(self, batches: list[Counted]) -> TeacherBatches | None:
        """How a local teacher looks at these micro-batches of a step; None if it takes them as they are."""

    @property
    def kept_per_token(self) -> int | None:
        """Bytes that stay of a token that a local teacher has looked at, if its weights come from the host for that: an evaluation makes as
        few visits as a step. None else."""
        return None

    @abstractmethod
    def signals(self, batches: InTurn) -> list[Signal | None]:
        """What a local teacher says about the trained tokens of each batch, before the student's first forward; None for one that it looks
        at during the student's turn, or of which nothing is on this rank."""

    def references(self, batches: InTurn) -> list[Signal | None]:
        """With ``--gkd_extrapolation``: what the student's base says, as :meth:`signals`, about batches as the student sees them."""
        return [None] * len(batches)

    @abstractmethod
    def run(self, batches: InTurn) -> None:
        """Forwards without gradient; each is booked with ``add_loss``."""

    @abstractmethod
    def before_training(self) -> AbstractContextManager:
        """The student as :meth:`run` wants it, in eval mode, in front of a step."""

    @abstractmethod
    def whole(self, parts: torch.Tensor) -> torch.Tensor:
        """Sums over the ranks that each hold a part of a sample's tokens (context parallelism)."""

    @property
    @abstractmethod
    def last_checkpoint(self) -> str | None:
        """The last one that was written; None before the first."""

    @property
    def checkpoint(self) -> str:
        """Where the checkpoint of the last finished step is, or would be."""
        return os.path.join(self.args.output_dir, f'checkpoint-{self.step}')

    @abstractmethod
    def is_complete(self, checkpoint: str) -> bool:
        """Whether it is there, as this rank sees it."""

    @abstractmethod
    def save(self) -> None:
        """Write it, with what :meth:`Conductor.save` keeps."""

    @abstractmethod
    def how_to_resume(self, checkpoint: str) -> str:
        """The options with which the run goes on from there."""
