"""The megatron-core back end, as the step needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from swift.megatron.utils import maybe_finalize_async_save
from swift.template import update_generation_config_eos_token
from torch import nn
from transformers import AutoConfig, GenerationConfig

from ..responses import Prompt, Response, SamplingOptions
from ..responses.local import evaluation_mode
from ..sources import STUDENT, Source
from ..step.backend import Backend
from ..step.balance import Balancing
from ..step.ranks import Ranks
from ..step.samples import Counted, InTurn, Sample
from ..step.teaching import TeacherBatches, bytes_per_token
from ..teachers import Signal, TopKOptions
from .generation import Generator
from .layouts import RelocatedTeacher, TrackedRandomState
from .options import depends_on_micro_batches, schedule_multiple
from .questions import TOKENS


def _keeping_busy(stages: int) -> int:
    """Micro-batches with which all stages of a pipeline are busy for most of the time."""
    return 2 * stages if stages > 1 else 1


class MegatronBackend(Backend):
    """
    Args:
        trainer: The :class:`~.trainer.GKDTrainer` whose loop it is. Ranks that differ in tensor, context or pipeline parallelism alone work
            on the same rows. Each of them draws, encodes and numbers the rows itself, which is cheaper than sending them around.
    """

    learning_rate = '--lr'

    def __init__(self, trainer):
        self.trainer, self.args = trainer, trainer.args
        self.ranks = Ranks(torch.device(self.args.device), mpu.get_data_parallel_group(), trainer._get_rollout_group())
        self.multiple = schedule_multiple(self.args)

    @property
    def step(self) -> int:
        return self.trainer.state.iteration

    @property
    def state(self) -> Any:
        return self.trainer.state

    @property
    def num_steps(self) -> int:
        return self.args.train_iters

    def random_state(self) -> TrackedRandomState:
        return TrackedRandomState()  # megatron-core has generators of its own

    def ending_ids(self) -> list[int]:
        return self._ending_ids(self.args.model_dir)

    def _ending_ids(self, model_dir: str) -> list[int]:
        try:
            config = GenerationConfig.from_pretrained(model_dir)
        except OSError:
            config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_dir, trust_remote_code=True))
        template = self.trainer.template
        update_generation_config_eos_token(config, template)
        eos = template.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        return eos if isinstance(eos, list) else [eos]

    def generate(self, source: Source, prompts: list[Prompt], seeds: list[int], options: SamplingOptions) -> list[Response]:
        separate = source != STUDENT and self.trainer.teacher_models is not None
        eos = self._ending_ids(self.args.teacher_model_dir if separate else self.args.model_dir)
        generator = Generator(self.trainer.template, partial(self._lent, source), eos, self.args.gkd_generation_tokens)
        return generator(prompts, seeds, options)

    @contextmanager
    def _lent(self, source: Source) -> Iterator[list[nn.Module]]:
        trainer, student = self.trainer, source == STUDENT
        if student:
            with trainer.gathered_weights():
                yield trainer.unwrapped_models
        else:
            with self._room_for_visit(), trainer.teacher.ready():
                yield trainer.teacher.chunks

    def roll_out(self, samples: list[Sample]) -> None:
        self.trainer.roll_out(samples)

    def roll_out_ahead(self, samples: list[Sample]) -> None:
        self.trainer.roll_out_ahead(samples)

    @property
    def balancing(self) -> Balancing | None:
        """All data-parallel ranks run the same number of micro-batches, of about the same size: with experts spread over them they wait for
        each other in every layer."""
        args = self.args
        if depends_on_micro_batches(args) is not None:
            return None
        busy = _keeping_busy(args.pipeline_model_parallel_size)
        return Balancing(args.gkd_micro_batch_tokens, at_least=busy, multiple=schedule_multiple(args))

    def teacher_batches(self, batches: list[Counted]) -> TeacherBatches | None:
        """Of a separate model. It takes those of the student under context parallelism, which is for long rows, and where the student
        takes its routing."""
        trainer, args = self.trainer, self.args
        if trainer.teacher_models is None or args.context_parallel_size > 1 or trainer.routing is not None:
            return None
        teacher, relocated = trainer.teacher, isinstance(trainer.teacher, RelocatedTeacher)
        busy = _keeping_busy(teacher.args.pipeline_model_parallel_size)
        return TeacherBatches(
            args.gkd_teacher_batch_size,
            max(2 * max(batch.size for batch in batches), TOKENS),
            # The replicas of a relocated teacher share out the batches of all ranks, and run each other's number of rounds.
            lockstep=not relocated and teacher.args.expert_model_parallel_size > 1,
            at_least=-(-busy * teacher.replicas // mpu.get_data_parallel_world_size()) if relocated else busy,
            multiple=1 if relocated else schedule_multiple(teacher.args),
        )

    @property
    def kept_per_token(self) -> int | None:
        trainer = self.trainer
        if not trainer.conductor.scored_locally or trainer.teacher.host_copy is None:
            return None
        reference = 0 if trainer.reference is None else bytes_per_token(None, trainer.reference.chunks[0].config.hidden_size)
        return bytes_per_token(self.args.gkd_logits_topk, trainer.teacher.chunks[0].config.hidden_size) + reference

    def signals(self, batches: InTurn) -> list[Signal | None]:
        options, k = self.trainer.loss.options, self.args.gkd_logits_topk
        topk = None if k is None else TopKOptions(k, options.divergence.temperature, options.vocab_size)
        trainer = self.trainer
        # An evaluation is of the student as it will be alone.
        trainer.teacher.routing = None if trainer.conductor.books.evaluating else trainer.routing
        with trainer.conductor.metrics.seconds('seconds/teacher'), self._room_for_visit():
            return trainer.teacher.signals(batches, topk)

    def references(self, batches: InTurn) -> list[Signal | None]:
        with self.trainer.conductor.metrics.seconds('seconds/reference'):
            return self.trainer.reference.signals(batches)

    @contextmanager
    def _room_for_visit(self) -> Iterator[None]:
        """A teacher that comes from the host has the place of the student's gradients meanwhile, and that of the optimizer's state where
        this leaves. The gradients are zero: the teacher answers and looks at a step before the step's first forward. A captured step of
        the optimizer would read them where they were."""
        trainer = self.trainer
        lends = trainer.teacher.host_copy is not None and not self.args.optimizer_cuda_graph
        lent = [m for m in trainer.wrapped_models if isinstance(m, DistributedDataParallel)] if lends else []
        # The state first: with the gradients the allocator gives back what is free.
        with trainer.optimizer_state.away(trainer.conductor.metrics) if trainer.optimizer_state else nullcontext():
            for model in lent:
                model.offload_grad_buffers()
            try:
                yield
            finally:
                for model in lent:
                    model.restore_grad_buffers()

    def run(self, batches: InTurn) -> None:
        trainer = self.trainer
        get_forward_backward_func()(
            forward_step_func=trainer.forward_step,
            data_iterator=trainer.for_each_chunk(batches),
            model=trainer.wrapped_models,
            num_microbatches=len(batches),
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=True,
        )
        if trainer.conductor.books.evaluating:
            trainer.call_event('on_eval_step')

    @contextmanager
    def before_training(self) -> Iterator[None]:
        with self.trainer.gathered_weights(), ExitStack() as stack:
            for model in self.trainer.wrapped_models:
                stack.enter_context(evaluation_mode(model))
            yield

    def whole(self, parts: torch.Tensor) -> torch.Tensor:
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(parts, group=mpu.get_context_parallel_group())
        return parts

    @property
    def last_checkpoint(self) -> str | None:
        return self.trainer.state.last_model_checkpoint

    def is_complete(self, checkpoint: str) -> bool:
        # The last file of a checkpoint.
        return os.path.isfile(os.path.join(checkpoint, 'latest_checkpointed_iteration.txt'))

    def save(self) -> None:
        with self.trainer.gathered_weights():
            self.trainer.save_checkpoint()
        maybe_finalize_async_save(self.args, blocking=True, terminate=True)

    def how_to_resume(self, checkpoint: str) -> str:
        name = 'mcore_adapter' if self.args.tuner_type == 'lora' else 'mcore_model'
        return f'--{name} {checkpoint} --finetune false'
