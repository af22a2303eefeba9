"""What happens around an update of transformers' loop."""

from __future__ import annotations

from transformers import TrainerCallback

from .placement import trained_parameters


class BeforeUpdate(TrainerCallback):
    """Between a step's last backward pass and its update, so that no weight and no checkpoint takes part in a loss that is not a number.

    Args:
        trainer: The :class:`~.trainer.GKDTrainer`.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.trainer.conductor.before_update()


class Follower(TrainerCallback):
    """A moving teacher begins as the student, and follows it after each update, before any checkpoint is written.

    Args:
        trainer: The :class:`~.trainer.GKDTrainer`.
    """

    def __init__(self, trainer):
        self.trainer, self.average = trainer, trainer.teacher.average

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.average.begin(trained_parameters(self.trainer))
        if self.trainer.resumes_from is not None:
            self.average.load(self.trainer.resumes_from)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.average.follow()
