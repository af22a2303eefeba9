"""GKD on megatron-core: the hooks of Megatron-SWIFT's loop, around the step of :mod:`..step.conductor`.

:meth:`GKDTrainer._replace_data_iterator` has the conductor bring an optimizer step's rows to micro-batches with what the teacher says
about them. :meth:`GKDTrainer.forward_step` runs inside megatron-core's schedule and sums each micro-batch's loss; megatron-core divides
the gradient by the trained tokens of the whole step, over all data- and context-parallel ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from swift.megatron.callbacks.print import PrintCallback
from swift.megatron.trainers.gkd_trainer import MegatronGKDTrainer
from swift.megatron.trainers.rlhf_mixin import MegatronRLHFTrainer
from swift.utils import get_current_device, get_logger
from torch import nn

from .. import checks, versions
from ..divergence import TokenStats
from ..sources import TEACHER, Draw
from ..step.conductor import Conductor
from ..step.data import Row, filled_up, row_loader, worker_options
from ..step.objective import LossOptions
from ..step.remote import RemoteTeacher, teacher_that_answers
from ..step.samples import InTurn, MicroBatch
from ..teachers.adapters import adapter_has_effect
from ..world import from_all
from .average import Follower
from .backend import MegatronBackend
from .chunks import for_each_chunk
from .engine import EngineRollout
from .head import OutputHead, mark_shards
from .layouts import common_padding
from .loss import DistillationLoss
from .memory import bytes_of_moments
from .optimizer import leaving_state
from .options import loads_teacher, resumed_from, said_once
from .placement import build_teacher, check_heads, check_who_generates, load_teacher, local_teacher, merged_adapters, reference_of
from .routers import leave_padding_out, leave_unweighed, weigh
from .routing import RoutingReplay
from .teachers import AveragedStudent, LiveStudent, LocalTeacher, SharedBase
from .views import LocalView, local_view

logger = get_logger()


class GKDTrainer(EngineRollout, MegatronRLHFTrainer):
    """Generalized Knowledge Distillation (Agarwal et al., 2024, arXiv 2306.13649) for Megatron-SWIFT.

    Args:
        args: ms-swift's arguments, which Megatron-SWIFT hands over whole.
        template: The student's template.
        kwargs: What ms-swift's pipeline passes to its own trainer, and ``tokenizer_lengths``, the lengths of the student's and the
            teacher's tokenizer (None if there is no other model), ``teacher_is_start``: whether the teacher is a copy of the weights that
            training starts from, ``rewards``: the reward functions, and ``optimizer_leaves``: whether the optimizer has to make room when
            the teacher visits.
    """

    sample_cls = MegatronGKDTrainer.sample_cls

    def __init__(self, args, template, **kwargs):
        self.vllm_client = kwargs.pop('vllm_client', None)
        self._tokenizer_lengths = kwargs.pop('tokenizer_lengths', None)
        self._teacher_is_start = kwargs.pop('teacher_is_start', False)
        rewards = kwargs.pop('rewards', None)
        self._optimizer_leaves = kwargs.pop('optimizer_leaves', False)
        self.args = args
        self.steps_per_generation, self.per_step = args.steps_per_generation, args.num_microbatches
        # ms-swift would make its own client of it, with vLLM installed.
        server_urls, args.teacher_model_server = args.teacher_model_server, None
        self._setup_teacher()
        args.teacher_model_server = server_urls
        super().__init__(args, template, **kwargs)
        logger.info(versions.banner(type(self)))
        args.device = get_current_device()  # what transformers' arguments have and Megatron-SWIFT's have not
        args.min_p = 0.0
        # Sequence and context parallelism cut sequences into equal parts.
        padding_to, template.sequence_parallel_size = common_padding(args, *([self.teacher_layout.args] if self.teacher_layout else []))
        template.data_collator = partial(template.data_collator, padding_to=padding_to)

        self._rollout_group, self._rollout_groups_created = None, False  # ms-swift's, which it sets with its engine
        backend = MegatronBackend(self)
        self.answering = self.teacher = None
        if args.gkd_loss_weight > 0 or args.seq_kd or args.gkd_eval_source == TEACHER:
            model, dtype = args.teacher_model_dir if args.teacher_model is not None else None, args.torch_dtype
            self.answering = teacher_that_answers(args, backend.ranks, server_urls, model, dtype, lambda: self.state.iteration)
            self.teacher = self._resolve_teacher()
        self.reference = reference_of(self)
        head = OutputHead(self.unwrapped_models)
        self.loss = DistillationLoss(self._loss_options(head), head, self.teacher.adapter if self.teacher else True)
        self.conductor = Conductor(
            backend, template, self.loss.options, self.teacher, self.answering, write_on_rank='last', rewards=rewards
        )
        self.conductor.connect(self.loss)
        if isinstance(self.teacher, AveragedStudent):
            self.callbacks.append(Follower(self))
        self._init_rollout_engine()

    # -- what is trained, and by whom ------------------------------------------------------------------------------------------

    def prepare_model(self) -> None:
        super().prepare_model()
        if self.teacher_models is not None:
            load_teacher(self.args, self.teacher_models, self.teacher_layout, self._teacher_adapters)

    def _prepare_peft_model(self, models: list[nn.Module]) -> list[nn.Module]:
        # Every model is built, and looked at, before any weights load.
        self.teacher_models, self.teacher_layout = build_teacher(self.args) if loads_teacher(self.args) else (None, None)
        self._teacher_adapters = merged_adapters(self.args, self.teacher_models)
        check_heads(models, self.teacher_models)
        check_who_generates(self.args, models, self.teacher_models)
        self.routing = None
        if self.args.gkd_routing == 'teacher' and self.args.gkd_loss_weight > 0:
            with said_once():
                self.routing = RoutingReplay(self.args, models, self.teacher_models or models)
        peft_models = super()._prepare_peft_model(models)
        mark_shards(models)
        leave_unweighed(models)
        leave_padding_out(models)
        return peft_models

    def _resolve_teacher(self) -> LocalTeacher | RemoteTeacher:
        scores = self.answering is not None and self.teacher_models is None
        teacher = self.answering if scores else local_teacher(self)
        logger.info(f'Student: {type(self.unwrapped_models[0]).__name__}; teacher: {teacher.description}.')
        return teacher

    def _is_student(self, resumes: bool) -> bool:
        """Whether teacher and student are one model when training begins."""
        begun = resumes or any(map(adapter_has_effect, self.unwrapped_models))
        if self.reference is not None and begun:
            return False  # what the teacher is moved away from is another one
        if isinstance(self.teacher, LiveStudent | AveragedStudent):
            return True
        return (self._teacher_is_start and not resumes) or (isinstance(self.teacher, SharedBase) and not begun)

    def _loss_options(self, student: OutputHead) -> LossOptions:
        teacher = None if self.teacher_models is None or self.teacher is None else self.teacher.head.columns
        return LossOptions.of(self.args, student.columns, teacher, self._tokenizer_lengths)

    # -- rows to micro-batches -----------------------------------------------------------------------------------------------------

    def _row_loader(self, dataset, **how):
        args = self.args
        rank, world_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        options = worker_options(args, self.per_step * args.steps_per_generation)
        if not hasattr(dataset, '__len__'):
            options['shares'] = from_all(rank)
        return row_loader(dataset, args.micro_batch_size, drop_last=False, rank=rank, world_size=world_size, **how, **options)

    def _training_rows(self, dataset) -> Iterator[list[Row]]:
        """Micro-batches without end. The schedule wants the same number in every step, so the last step of an epoch gets fillers; a stream
        begins again in the middle of a step."""
        args, per_step = self.args, self.per_step
        seed = args.data_seed if args.train_dataloader_shuffle else None
        if not hasattr(dataset, '__len__'):
            yield from self._row_loader(dataset, seed=None, draw=Draw.of(args), skip=self.state.iteration * per_step, endless=True)
            return
        prepare = self.conductor.cycle.prepared
        loader = self._row_loader(dataset, seed=seed, draw=Draw.of(args), epochs=args.num_train_epochs or 1, prepare=prepare)
        steps = -(-len(loader) // per_step)
        first, skipped = divmod(self.state.iteration, steps)
        loader.batch_sampler.skip = skipped * per_step
        for epoch in itertools.count(first):
            loader.set_epoch(epoch)
            yield from filled_up(loader, per_step)
            loader.batch_sampler.skip = 0

    def setup_model_training(self) -> None:
        super().setup_model_training()
        for callback in self.callbacks:
            # Stock writes logging.jsonl from a daemon thread (4.6.0, megatron/callbacks/print.py:32): its end is lost with the process.
            if isinstance(callback, PrintCallback):
                callback.jsonl_writer.enable_async = False

    def setup_training(self, train_dataset, val_dataset) -> tuple[Iterator[list[Row]], Any]:
        args = self.args
        self.setup_model_training()
        if args.nccl_comm_warmup and self.teacher_layout is not None:
            self.teacher_layout.warm_up()
        self.config.finalize_model_grads_func = self._finalize_model_grads
        self.optimizer_state = leaving_state(self, self._optimizer_leaves, bytes_of_moments(args) or 0)
        parts = f'{args.micro_batch_size} per micro-batch x {args.generation_batch_size // args.micro_batch_size} of all ranks'
        if hasattr(train_dataset, '__len__'):
            checks.check_size(len(train_dataset), -(-args.generation_batch_size // args.gkd_num_samples), parts)
        resumed = resumed_from(args)
        self.conductor.warn_if_nothing_to_learn(train_dataset, self._is_student(resumed is not None))
        self.conductor.begin(train_dataset, resumed and resumed[0])
        return self._training_rows(train_dataset), val_dataset

    def _replace_data_iterator(self, rows: Iterator[list[Row]]) -> list[Iterator[MicroBatch]]:
        """The teacher looks at one step at a time: its weights can be those of the student, and its hidden states take room."""
        self._step, per_step = self.state.iteration, self.per_step
        batches = self.conductor.next_step(rows, per_step, per_step * self.steps_per_generation)
        self.args.num_microbatches = len(batches)  # what ms-swift runs the schedule with (4.6.0, megatron/trainers/base.py:1007)
        return self.for_each_chunk(batches)

    def for_each_chunk(self, batches: InTurn) -> list[Iterator[MicroBatch]]:
        """Of the student."""
        return for_each_chunk(batches, len(self.unwrapped_models))

    # -- the loss --------------------------------------------------------------------------------------------------------------------

    def forward_step(self, data_iterator: Iterator[MicroBatch], model: nn.Module):
        """One micro-batch through one chunk of the student. The second value turns its output into the step's sums, on the last stage."""
        batch = next(data_iterator)
        chunk = self.unwrapped_models[self.wrapped_models.index(model)]
        stats = TokenStats(detail=self.args.gkd_detailed_metrics and self.teacher is not None)
        with self.conductor.metrics.seconds('seconds/student'):
            view = local_view(self.args, batch.student_inputs, batch.student_index, chunk.vp_stage)
            signal = batch.signal
            if self.conductor.scored_by_server and view.here is not None:  # of all tokens, not only of those that are here
                signal = dataclasses.replace(signal, logprobs=view.of(signal.logprobs), ids=view.of(signal.ids))
            replays = self.routing and self.conductor.scored_locally and self.conductor.books.training
            replayed = self.routing.replayed(chunk, batch) if replays else nullcontext()
            with replayed:
                output = self.loss(lambda inputs: model(**inputs), batch, view, signal, stats)
        weigh(output, batch.num_tokens, chunk.config)
        return output, partial(self.loss_func, batch=batch, view=view, stats=stats)

    def loss_func(self, output: torch.Tensor, *, batch: MicroBatch, view: LocalView, stats: TokenStats):
        """(sum of the loss, number of trained tokens) of what is here of a micro-batch; megatron-core adds both up and divides."""
        total = output.sum()
        self.conductor.add_loss(batch, total, stats, view.of)
        return total, torch.tensor(len(view.index), dtype=torch.int, device=total.device), {}

    def _finalize_model_grads(self, *args: Any, **kwargs: Any) -> None:
        self.conductor.before_update()
        if self.routing is not None:
            self.routing.clear()
        finalize_model_grads(*args, **kwargs)

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def evaluate(self, dataset) -> dict[str, float]:
        for model in self.wrapped_models:
            model.eval()
        self.call_event('on_eval_begin')
        self._step, at_once = self.state.iteration, self.per_step
        found = self.conductor.evaluate(
            filled_up(self._row_loader(dataset, seed=None, prepare=self.conductor.prepared_for_evaluation), at_once), at_once
        )
        metrics = {'n_steps': 1, **found}
        self.on_log(logs=metrics, prefix='eval_')
        self.call_event('on_eval_end')
        return metrics

    # -- logs and checkpoints --------------------------------------------------------------------------------------------------------

    def on_log(self, logs: dict[str, Any], prefix: str = '') -> None:
        if not prefix:
            logs.update(self.conductor.logged())
        super().on_log(logs, prefix)

    def save_checkpoint(self) -> None:
        self.conductor.finish_begun()
        self.conductor.save(self.conductor.backend.checkpoint)
        if isinstance(self.teacher, AveragedStudent):
            self.teacher.average.save(self.conductor.backend.checkpoint)
        super().save_checkpoint()
