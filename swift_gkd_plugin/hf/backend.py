"""The transformers, accelerate, DeepSpeed and FSDP back end, as the step needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from swift.utils import unwrap_model_for_generation
from torch import nn
from transformers import TrainerState

from ..responses import Prompt, Response, SamplingOptions
from ..responses.local import LocalGenerator, evaluation_mode, stand_in
from ..sources import STUDENT, Source
from ..step.backend import Backend
from ..step.ranks import Ranks
from ..step.samples import Counted, InTurn, Sample
from ..step.teaching import TeacherBatches, bytes_per_token
from ..teachers import Signal
from .zero3 import gathered_for_generation, is_zero3, ranks_share_weights

# Tokens in a batch of the teacher's, if the student's are not half as large already: of one whose weights are brought together for each
# batch, and of one that is there anyway. A forward without a backward pass takes 0.2 to 0.3 MB per token of a 32B model.
MANY_TOKENS, FEW_TOKENS = 16384, 4096


class TransformersBackend(Backend):
    """
    Args:
        trainer: The :class:`~.trainer.GKDTrainer` whose loop it is. Every rank has rows of its own.
    """

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        self.ranks = Ranks(self.args.device)
        self.saves_only_weights = self.args.save_only_model

    @property
    def step(self) -> int:
        return self.trainer.state.global_step

    @property
    def num_steps(self) -> int:
        return self.trainer.state.max_steps

    def ending_ids(self) -> list[int]:
        eos = self.trainer.bare.generation_config.eos_token_id
        return sorted(set(eos if isinstance(eos, list) else [eos]) - {None})

    def generate(self, source: Source, prompts: list[Prompt], seeds: list[int], options: SamplingOptions) -> list[Response]:
        """Where ranks share the weights, all of them take part if one has a prompt."""
        trainer, asked = self.trainer, len(prompts)
        answering = trainer.bare if source == STUDENT else trainer.teacher.bare
        lockstep = trainer.accelerator.num_processes > 1 and ranks_share_weights(answering)
        if lockstep and not self.ranks.anywhere(asked):
            return []
        if lockstep and not asked:
            prompts, seeds = [stand_in(trainer.template)], [0]
        generator = LocalGenerator(
            trainer.template, partial(self._lent, source), self.args.device, lockstep, self.args.gkd_generation_tokens
        )
        return generator(prompts, seeds, options)[:asked]

    @contextmanager
    def _lent(self, source: Source) -> Iterator[nn.Module]:
        trainer, student = self.trainer, source == STUDENT
        gathers = self.args.ds3_gather_for_generation if student else trainer.teacher_ds3_gather_for_generation
        alone = not student and trainer.is_teacher_ds3 and not is_zero3(self.args.deepspeed)
        with (
            nullcontext(trainer.model_wrapped) if student else trainer.teacher.ready() as model,
            gathered_for_generation(model) if alone and gathers else nullcontext(),
            unwrap_model_for_generation(model, trainer.accelerator, gather_deepspeed3_params=gathers) as bare,
        ):
            yield bare

    def roll_out(self, samples: list[Sample]) -> None:
        self.trainer.roll_out(samples)

    def roll_out_ahead(self, samples: list[Sample]) -> None:
        self.trainer.roll_out_ahead(samples)

    def teacher_batches(self, batches: list[Counted]) -> TeacherBatches | None:
        """Of a separate model. One that lives in the student's looks at a micro-batch right before the student does."""
        teacher, args = self.trainer.teacher, self.args
        if self._lives_in_student or teacher.routing is not None:
            return None
        if not self.trainer.heads_verified:  # now: whether a head is dense decides what is kept
            first = self.trainer.conductor.encoder.micro_batch(batches[0].samples)
            self.trainer.verify_heads(self.trainer.model_wrapped, first.to(args.device))
        tokens = max(2 * max(batch.size for batch in batches), MANY_TOKENS if teacher.is_sharded or teacher.host_copy else FEW_TOKENS)
        kept = None if teacher.comes_once else self._bytes_per_token
        return TeacherBatches(args.gkd_teacher_batch_size, tokens, teacher.is_sharded, bytes_per_token=kept)

    @property
    def _bytes_per_token(self) -> int:
        """Of what the teacher says."""
        return bytes_per_token(self.args.gkd_logits_topk, self.trainer.teacher.head.width)

    @property
    def kept_per_token(self) -> int | None:
        trainer = self.trainer
        if not trainer.conductor.scored_locally or trainer.teacher.host_copy is None or trainer.teacher.routing is not None:
            return None
        return self._bytes_per_token

    @property
    def _lives_in_student(self) -> bool:
        return self.trainer.teacher.model is self.trainer.model

    def signals(self, batches: InTurn) -> list[Signal | None]:
        if self._lives_in_student or self.trainer.teacher.routing is not None:
            return [None] * len(batches)
        return self.trainer.signals(batches)

    def run(self, batches: InTurn) -> None:
        trainer = self.trainer
        for batch in batches:
            batch = trainer._prepare_inputs(batch)
            with trainer.template.forward_context(trainer.model, batch.student_inputs):
                trainer.sum_over_tokens(trainer.model_wrapped, batch)

    def before_training(self) -> AbstractContextManager:
        return evaluation_mode(self.trainer.bare)

    def whole(self, parts: torch.Tensor) -> torch.Tensor:
        return parts

    @property
    def last_checkpoint(self) -> str | None:
        return getattr(self.trainer.state, 'last_model_checkpoint', None)  # ms-swift sets it with the first one

    def is_complete(self, checkpoint: str) -> bool:
        return os.path.isfile(os.path.join(checkpoint, 'trainer_state.json'))

    def save(self) -> None:
        self.trainer._save_checkpoint(self.trainer.model_wrapped, None)

    @property
    def state(self) -> TrainerState:
        return self.trainer.state

    def how_to_resume(self, checkpoint: str) -> str:
        return f'--resume_from_checkpoint {checkpoint}'
