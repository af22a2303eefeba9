"""GKD on transformers, accelerate, DeepSpeed and FSDP: the hooks of their loop, around the step of :mod:`..step.conductor`.

:meth:`GKDTrainer.get_batch_samples` has the conductor bring an optimizer step's rows to micro-batches; :meth:`GKDTrainer.compute_loss`
divides each micro-batch's sum by the trained tokens of the whole step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import patch_environment
from swift.rlhf_trainers.utils import prepare_fsdp
from swift.trainers import SwiftMixin
from swift.utils import HfConfigFactory, get_logger
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .. import checks, versions
from ..arguments import engine_scores, teacher_offload
from ..divergence import TokenStats
from ..responses.local import evaluation_mode
from ..sources import TEACHER, Draw
from ..step.conductor import Conductor
from ..step.data import Row, row_loader, worker_options
from ..step.objective import LossOptions
from ..step.remote import RemoteTeacher, teacher_that_answers
from ..step.samples import InTurn, MicroBatch
from ..teachers import Signal, TopKOptions
from ..teachers.adapters import adapter_has_effect
from .backend import TransformersBackend
from .callbacks import BeforeUpdate, Follower
from .engine import EngineRollout
from .head import OutputHead
from .loading import is_spread
from .loss import DistillationLoss
from .placement import local_teacher, reference_of
from .routing import RoutingReplay
from .teachers import AdapterOnBase, AveragedStudent, LiveStudent, LocalTeacher, SharedBase
from .zero3 import one_trace

logger = get_logger()


class GKDTrainer(EngineRollout, SwiftMixin, Trainer):
    """Generalized Knowledge Distillation (Agarwal et al., 2024, arXiv 2306.13649) for ms-swift.

    Args:
        model: The student.
        kwargs: What ms-swift's pipeline passes to its own trainer, and ``tokenizer_lengths``, the lengths of the student's and the
            teacher's tokenizer (None if there is no other model), and ``teacher_is_start``: whether the teacher is a copy of the weights
            that training starts from; ``teacher_path``, where its weights are; ``rewards``, the reward functions.
    """

    def __init__(self, model: nn.Module, *_args, **kwargs):
        self.vllm_client = kwargs.pop('vllm_client', None)
        self._tokenizer_lengths = kwargs.pop('tokenizer_lengths', None)
        self._teacher_is_start = kwargs.pop('teacher_is_start', False)
        teacher_path, topk = kwargs.pop('teacher_path', None), kwargs.pop('gkd_logits_topk', None)
        rewards = kwargs.pop('rewards', None)
        self._pop_teacher_kwargs(kwargs)
        # ms-swift would make its own client of it, on rank 0 and with vLLM installed.
        server_urls, self.teacher_model_server = self.teacher_model_server, None
        super().__init__(model, None, *_args, **kwargs)
        args = self.args
        args.gkd_logits_topk = topk  # ms-swift's arguments have it, its trainer's do not
        logger.info(versions.banner(type(self)))
        # compute_loss divides by the tokens of the whole step. transformers would divide by the step's micro-batches too, unless there is
        # a compute_loss_func, which nothing calls here; its own name for this, loss_is_scaled_for_ga, is new in 5.19.
        self.compute_loss_func = self.compute_loss
        args.logging_nan_inf_filter = False  # it would hide what BeforeUpdate is there to find
        self.add_callback(BeforeUpdate(self))
        if self.is_fsdp_enabled:
            self._keep_dtype_of_outputs()
        self._setup_teacher()

        backend = TransformersBackend(self)
        self.answering = self.teacher = None
        if args.gkd_loss_weight > 0 or args.seq_kd or args.gkd_eval_source == TEACHER:
            dtype = self.bare.model_info.torch_dtype
            self.answering = teacher_that_answers(args, backend.ranks, server_urls, teacher_path, dtype, lambda: self.state.global_step)
            self.teacher = self._resolve_teacher(server_urls)
        self.reference = reference_of(self)
        if isinstance(self.teacher, AveragedStudent):
            self.add_callback(Follower(self))
        self.loss = DistillationLoss(self._loss_options(), OutputHead(self.bare), self.teacher.adapter if self.teacher else True)
        self.heads_verified = False
        self.conductor = Conductor(backend, self.template, self.loss.options, self.teacher, self.answering, rewards=rewards)
        self.conductor.connect(self.loss)
        if args.gkd_routing == 'teacher' and self.conductor.scored_locally:
            self.teacher.routing = RoutingReplay(self.bare, self.teacher.bare)
        if args.use_vllm:
            self.prepare_rollout()
        if hasattr(self.train_dataset, '__len__'):
            parts = f'{args.per_device_train_batch_size} per device x {args.steps_per_generation} steps x {args.world_size} ranks'
            checks.check_size(len(self.train_dataset), -(-args.generation_batch_size // args.gkd_num_samples), parts)
        self.resumes_from: str | None = None  # a checkpoint; None too if only its weights are wanted
        self.conductor.warn_if_nothing_to_learn(self.train_dataset, self._is_student(bool(args.resume_from_checkpoint)))

    # -- what is trained, and by whom ------------------------------------------------------------------------------------------

    @property
    def bare(self) -> nn.Module:
        """The student without its wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def _keep_dtype_of_outputs(self) -> None:
        """In mixed precision accelerate lets FSDP2 cast what every sharded module returns; here one of them returns the loss."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    def _setup_teacher(self) -> None:
        model, offload = self._teacher_model, teacher_offload(self.args)
        if model is None or self.is_deepspeed_enabled or self.is_fsdp_enabled or not (offload or is_spread(model)):
            super()._setup_teacher()
            return
        # ms-swift would bring the whole of it to the device, where it may not fit.
        self._teacher_model = None
        super()._setup_teacher()
        with patch_environment(ACCELERATE_BYPASS_DEVICE_MAP='true'):  # among ranks it would refuse a model that it is to train
            self.teacher_model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def _resolve_teacher(self, server_urls: str | None) -> LocalTeacher | RemoteTeacher:
        scores = self.answering is not None and (server_urls is not None or engine_scores(self.args))
        teacher = self.answering if scores else local_teacher(self)
        student = 'base + adapter (trainable)' if isinstance(teacher, SharedBase) else type(self.bare).__name__
        logger.info(f'Student: {student}; teacher: {teacher.description}.')
        return teacher

    def _is_student(self, resumes: bool) -> bool:
        """Whether teacher and student are one model when training begins."""
        if self.reference is not None and (resumes or adapter_has_effect(self.bare)):
            return False  # what the teacher is moved away from is another one
        if isinstance(self.teacher, LiveStudent | AveragedStudent):
            return True
        fresh = type(self.teacher) is SharedBase and not adapter_has_effect(self.bare)
        return (self._teacher_is_start or fresh) and not resumes

    def _loss_options(self) -> LossOptions:
        columns = [None, None]
        if self.teacher is not None and self.teacher.bare is not None and self._tokenizer_lengths is not None:
            columns = [OutputHead(model).columns for model in (self.bare, self.teacher.bare)]
        return LossOptions.of(self.args, *columns, self._tokenizer_lengths)

    # -- rows to micro-batches -----------------------------------------------------------------------------------------------------

    def _get_data_collator(self, args, template):
        return list

    def _row_loader(self, dataset, batch_size: int, **how):
        args = self.args
        options = worker_options(args, args.steps_per_generation)
        return row_loader(dataset, batch_size, rank=args.process_index, world_size=args.world_size, **how, **options)

    def get_train_dataloader(self, skip_batches: int = 0):
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return self._row_loader(
            self.train_dataset,
            self._train_batch_size,
            seed=seed if args.train_dataloader_shuffle else None,
            draw=Draw.of(args),
            epochs=1 if args.max_steps > 0 else args.num_train_epochs,
            drop_last=args.dataloader_drop_last,
            skip=skip_batches,
            endless=True,
            prepare=self.conductor.cycle.prepared if self.conductor.cycle else None,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        prepare = self.conductor.prepared_for_evaluation
        return self._row_loader(dataset, self.args.eval_batch_size, seed=None, drop_last=False, prepare=prepare)

    def get_batch_samples(self, epoch_iterator: Iterator[list[Row]], num_batches: int, device) -> tuple[InTurn, None]:
        return self.conductor.next_step(epoch_iterator, num_batches, self.args.steps_per_generation), None

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        here = inputs.to(self.args.device)
        inputs.signal = None  # transformers keeps a micro-batch until the next one is there
        return here

    # -- the loss --------------------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch=None) -> torch.Tensor:
        # Some templates patch the model's attention, for the backward pass of checkpointed layers too.
        routing = self.teacher.routing if self.conductor.scored_locally else None
        with (
            self.template.forward_context(self.model, inputs.student_inputs),
            routing.replayed() if routing else nullcontext(),
        ):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss, times the number of ranks, over which DDP averages."""
        tokens = self.conductor.tokens
        total, outputs = self.sum_over_tokens(model, inputs)
        loss = total / tokens
        aux = getattr(outputs, 'aux_loss', None)
        if aux is not None and self.aux_loss_enabled:
            loss = loss + self.aux_loss_coef * aux.to(loss.device) * (inputs.num_tokens / tokens)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.conductor.stop_together()  # its backward pass takes the optimizer step too
        loss = loss.to(self.args.device) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def sum_over_tokens(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Any]:
        """The loss summed over the micro-batch's tokens. The teacher goes first: its activations are gone when the student's come."""
        self.verify_heads(model, batch)
        stats = TokenStats(detail=self.args.gkd_detailed_metrics and self.teacher is not None)
        signal, just_ran, shared = batch.signal, False, None
        if signal is None and self.conductor.scored_locally:
            with self.conductor.visited(1 / self.conductor.num_batches):
                (signal,) = self.signals([batch])
            just_ran, shared = self.teacher.model is self.model, self.teacher.shared_work
        if signal is not None and self.reference is not None:
            with self.conductor.metrics.seconds('seconds/reference'), self._in_trace(model, just_ran):
                signal = self.reference.beside(signal, batch, self._call)
            just_ran, shared = True, self.reference.shared_work
        with (
            self.conductor.metrics.seconds('seconds/student'),
            shared.used(batch) if shared else nullcontext(),
            self._in_trace(model, just_ran),
        ):
            total, outputs = self.loss(lambda inputs: model(**self._with_router_logits(inputs)), batch, signal, stats)
        self.conductor.add_loss(batch, total, stats)
        return total, outputs

    def _in_trace(self, model: nn.Module, just_ran: bool) -> AbstractContextManager:
        """Around another forward through the student's model, after one before the same backward pass."""
        return one_trace(model) if just_ran and self.is_deepspeed_enabled else nullcontext()

    def signals(self, batches: Iterable[MicroBatch]) -> list[Signal]:
        """What a local teacher says, in one visit if it lives on the host."""
        with self.conductor.metrics.seconds('seconds/teacher'):
            return self.teacher.signals((batch.to(self.args.device) for batch in batches), self._call, self._topk_options())

    def _topk_options(self) -> TopKOptions | None:
        options, k = self.loss.options, self.args.gkd_logits_topk
        return None if k is None else TopKOptions(k, options.divergence.temperature, options.vocab_size)

    def _call(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        with self.template.forward_context(model, inputs):
            return model(**inputs)

    def _with_router_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, 'output_router_logits': True} if self.aux_loss_enabled else inputs

    def verify_heads(self, model: nn.Module, batch: MicroBatch) -> None:
        """Once, on the first micro-batch: is the list of what models do after their head complete for these two?"""
        if self.heads_verified:
            return
        self.heads_verified = True
        index = torch.linspace(0, batch.student_inputs['input_ids'].numel() - 1, 8, device=self.args.device).long()
        heads = [('student', self.loss.head, lambda: self._call(model, batch.student_inputs), evaluation_mode(self.bare))]
        if isinstance(self.teacher, AdapterOnBase) or (self.teacher is not None and self.teacher.model not in (None, self.model)):
            heads.append(('teacher', self.teacher.head, lambda: self._call(self.teacher.model, batch.student_inputs), self.teacher.ready()))
        for name, head, forward, ready in heads:
            # Eval mode in both: dropout would draw from the random numbers of the step. Nothing is compiled for it.
            with ready, torch.compiler.set_stance('force_eager'):
                reason = head.verify(forward, index)
            if reason:
                logger.warning(f'The {name} runs with whole logits, which take more memory, because {reason}.')
        if self.teacher is not None and self.teacher.model is self.model and not isinstance(self.teacher, AdapterOnBase):
            self.teacher.head = self.loss.head
        if self.reference is not None:
            self.reference.head = self.loss.head

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval'):
        model = self._prepared_for_evaluation()
        try:
            found = self.conductor.evaluate(dataloader, at_once=self.args.gradient_accumulation_steps)
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the root stays whole until a backward pass; an optimizer made now would get those tensors
        rows = found.pop('rows')
        return EvalLoopOutput(None, None, {f'{metric_key_prefix}_{name}': value for name, value in found.items()}, rows)

    def _prepared_for_evaluation(self) -> nn.Module:
        """The wrapped model in eval mode; prepared here if evaluation comes before any training."""
        if len(self.accelerator._models) == 0:
            if self.is_fsdp_enabled:
                # accelerate's prepare() wants an optimizer with it.
                self.model_wrapped = prepare_fsdp(self.model, self.accelerator, evaluation_mode=False)
                dist.fsdp.register_fsdp_forward_method(self.model, 'generate')
                self.accelerator._models.append(self.model)
            elif self.is_deepspeed_enabled:
                self.model_wrapped = self.accelerator.prepare(self.model)
            else:
                self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self.model.eval()
        return self.model_wrapped

    # -- logs and checkpoints --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if 'loss' in logs:
            metrics = self.conductor.logged()
            metrics.pop('loss', None)  # transformers' own has the auxiliary loss in it
            logs.update(metrics)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: MicroBatch) -> int:
        return super().floating_point_ops(inputs.student_inputs)

    def _track_num_input_tokens(self, inputs: MicroBatch) -> None:
        super()._track_num_input_tokens(inputs.student_inputs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        resume = None if self.args.resume_only_model else resume_from_checkpoint or self.args.resume_from_checkpoint
        self.resumes_from = resume or None
        self.forget_requests()
        self.conductor.begin(self.train_dataset, None if self.args.ignore_data_skip else self.resumes_from)
        if self.aux_loss_enabled:
            HfConfigFactory.set_config_attr(self.bare.config, 'router_aux_loss_coef', self.aux_loss_coef)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.conductor.finish_begun()
        if not self.args.save_only_model:
            checkpoint = self.conductor.backend.checkpoint
            self.conductor.save(checkpoint)
            if isinstance(self.teacher, AveragedStudent):
                self.teacher.average.save(checkpoint, writes=self.args.should_save)
        return super()._save_checkpoint(*args, **kwargs)
