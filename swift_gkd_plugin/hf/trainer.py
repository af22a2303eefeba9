"""GKD on transformers, accelerate, DeepSpeed and FSDP. One optimizer step, from top to bottom:

    rows -> sources -> responses -> encode -> teacher -> divergence -> one number

:meth:`GKDTrainer.get_batch_samples` brings an optimizer step's rows to the point where every response exists and is encoded, so that
the number of trained tokens of the whole step, over all ranks, is known before the first backward pass.
:meth:`GKDTrainer.compute_loss` divides each micro-batch's sum by it: the step is the same however it is split.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object, patch_environment
from swift.rlhf_trainers.utils import prepare_fsdp
from swift.template import update_generation_config_eos_token
from swift.trainers import SwiftMixin
from swift.utils import HfConfigFactory, JsonlWriter, get_logger, unwrap_model_for_generation
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from .. import activation, checks, sources
from ..arguments import OptionError, teacher_offload
from ..divergence import Divergence, TokenStats
from ..metrics import Metrics
from ..responses import SamplingOptions
from ..responses.local import LocalGenerator, evaluation_mode
from ..sources import DATASET, STUDENT, TEACHER, Source
from ..step import cycle as cycles
from ..step.cycle import Cycle
from ..step.data import Row, row_loader
from ..step.objective import LossOptions
from ..step.remote import RemoteTeacher
from ..step.samples import MicroBatch, Sample, SampleEncoder, TeacherView
from ..teachers import Signal, TopKOptions
from ..teachers.average import MovingAverage, ShardedParameters, WholeParameters
from ..teachers.engine import TeacherEngine, name_of_device
from ..teachers.offload import HostCopy, LayerStream
from ..teachers.server import ServerOptions, TeacherServerError, TeacherServers
from .engine import EngineRollout
from .head import OutputHead, language_model
from .loading import is_spread
from .loss import DistillationLoss
from .routing import RoutingReplay
from .shared_work import SharedWork
from .teachers import TEACHER_ADAPTER, AdapterOnBase, AveragedStudent, LiveStudent, LocalTeacher, SharedBase
from .zero3 import PartitionedParameters, is_zero3, one_trace

logger = get_logger()


class BeforeUpdate(TrainerCallback):
    """Between a step's last backward pass and its update: writes its responses down, and ends the run if its loss is not a number, so
    that no weight and no checkpoint takes part in it."""

    def __init__(self, trainer: GKDTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if args.log_completions:
            self.trainer.write_completions()
        self.trainer.stop_on_nan()


class Follower(TrainerCallback):
    """A moving teacher begins as the student, and follows it after each update, before any checkpoint is written."""

    def __init__(self, trainer: GKDTrainer, average: MovingAverage):
        self.trainer, self.average = trainer, average

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.average.begin(self.trainer.trained_parameters())
        if self.trainer.resumes_from is not None:
            self.average.load(self.trainer.resumes_from)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.average.follow()


class GKDTrainer(EngineRollout, SwiftMixin, Trainer):
    """Generalized Knowledge Distillation (Agarwal et al., 2024, arXiv 2306.13649) for ms-swift.

    Args:
        model: The student.
        kwargs: What ms-swift's pipeline passes to its own trainer, and ``tokenizer_lengths``, the lengths of the student's and the
            teacher's tokenizer (None if there is no other model), and ``teacher_is_start``: whether the teacher is a copy of the weights
            that training starts from; ``teacher_path``, where its weights are.
    """

    def __init__(self, model: nn.Module, *_args, **kwargs):
        self.vllm_client = kwargs.pop('vllm_client', None)
        self._tokenizer_lengths = kwargs.pop('tokenizer_lengths', None)
        self._teacher_is_start = kwargs.pop('teacher_is_start', False)
        self._teacher_path = kwargs.pop('teacher_path', None)
        self._topk = kwargs.pop('gkd_logits_topk', None)
        self._pop_teacher_kwargs(kwargs)
        # ms-swift would make its own client of it, on rank 0 and with vLLM installed.
        self._server_urls, self.teacher_model_server = self.teacher_model_server, None
        super().__init__(model, None, *_args, **kwargs)
        args = self.args
        logger.info(activation.banner(type(self)))
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole step
        args.logging_nan_inf_filter = False  # it would hide what BeforeUpdate is there to find
        self.add_callback(BeforeUpdate(self))
        self.metrics = Metrics(args.device)
        self.completions = JsonlWriter(os.path.join(args.output_dir, 'completions.jsonl'))
        if args.gkd_save_teacher_responses:
            self.teacher_responses = JsonlWriter(args.gkd_save_teacher_responses)

        if self.is_fsdp_enabled:
            self._keep_dtype_of_outputs()
        self._setup_teacher()
        self.teacher = self._resolve_teacher() if args.gkd_loss_weight > 0 or args.seq_kd or args.gkd_eval_source == TEACHER else None
        if args.gkd_routing == 'teacher' and self._uses_local_teacher:
            self.teacher.routing = RoutingReplay(self._bare(), self.teacher.bare)
        self.loss = DistillationLoss(self._loss_options(), OutputHead(self._bare()), self.teacher.adapter if self.teacher else True)
        self._heads_verified = False
        view = TeacherView(args.gkd_teacher_system, args.gkd_teacher_enable_thinking)
        tag_key = args.teacher_tag_key if isinstance(self.teacher, RemoteTeacher) else None
        self.encoder = SampleEncoder(self.template, view, self.teacher is not None, tag_key)
        if args.use_vllm:
            self.prepare_rollout()
        self.cycle = Cycle(args, self.train_dataset, self.encoder, self._answers())
        self._check_dataset_size()
        self._warn_if_nothing_to_learn()

        self._ready: deque[list[Sample]] = deque()  # micro-batches that have their responses and wait for their optimizer step
        self._resumed: dict[str, Any] | None = None  # what the checkpoint has kept of those
        self.resumes_from: str | None = None  # that checkpoint; None too if only its weights are wanted
        self._begun: list[list[Sample]] = []  # the cycle that the rollout server answers while a step trains
        self._cycle_key = 0, 0  # optimizer step and number of the cycle in it
        self._step_tokens = self._step_batches = 1
        self._step_losses: list[tuple[torch.Tensor, list[Sample]]] = []

    # -- what is trained, and by whom ------------------------------------------------------------------------------------------

    def _bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _keep_dtype_of_outputs(self) -> None:
        """In mixed precision accelerate lets FSDP2 cast what every sharded module returns; here one of them returns the loss."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    def _resolve_teacher(self) -> LocalTeacher | RemoteTeacher:
        self.answering = self._teacher_that_answers()
        if self.answering is not None and (self._server_urls is not None or self._topk is not None):
            teacher = self.answering  # it scores as well
        elif self.teacher_model is not None:
            bare = self.accelerator.unwrap_model(self.teacher_model)
            update_generation_config_eos_token(bare.generation_config, self.template)
            if self.is_fsdp_enabled:
                dist.fsdp.register_fsdp_forward_method(bare, 'generate')  # PEFT's goes past the root's forward
            teacher = LocalTeacher(self.teacher_model, bare, self._host_copy(bare))
        else:
            teacher = self._self_teacher()
        student = 'base + adapter (trainable)' if isinstance(teacher, SharedBase) else type(self._bare()).__name__
        logger.info(f'Student: {student}; teacher: {teacher.description}.')
        return teacher

    def _self_teacher(self) -> LocalTeacher:
        teacher = self._kind_of_self_teacher()
        shared = SharedWork(self._bare(), layers=not self.aux_loss_enabled)
        if shared:
            parts = ', '.join(type(tower).__name__ for tower in shared.towers)
            logger.info(f'Teacher and student share the work of {parts or "no tower"} and the lowest {len(shared.layers)} layers.')
            teacher.shared_work = shared
        return teacher

    def _kind_of_self_teacher(self) -> LocalTeacher:
        if self.args.gkd_self_teacher == 'ema':
            average = MovingAverage(self.args.gkd_ema_decay)
            self.add_callback(Follower(self, average))
            return AveragedStudent(self.model, self._bare(), average)
        if not self._teacher_use_disable_adapter:
            kind = LiveStudent
        else:
            kind = AdapterOnBase if TEACHER_ADAPTER in self._bare().peft_config else SharedBase
        return kind(self.model, self._bare())

    def trained_parameters(self) -> WholeParameters:
        """What is trained, as the ranks hold it once training has begun."""
        if self.is_fsdp_enabled:
            return ShardedParameters(self._bare())
        if is_zero3(self.args.deepspeed):
            return PartitionedParameters(self._bare(), self.model_wrapped)
        return WholeParameters(self._bare())

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

    def _host_copy(self, teacher: nn.Module) -> HostCopy | LayerStream | None:
        """``--gkd_teacher_offload``. The output head stays on the device, for the loss comes after the teacher has left."""
        how, device = teacher_offload(self.args), self.args.device
        if how is None:
            return None
        if how == 'layer':
            host_copy = LayerStream(teacher, device)
        else:
            head = {id(p) for p in language_model(teacher).get_output_embeddings().parameters()}
            host_copy = HostCopy((getattr(p, 'ds_tensor', p) for p in teacher.parameters() if id(p) not in head), device)
        visitors = {id(weight) for weight in host_copy.weights}
        for tensor in (*(getattr(p, 'ds_tensor', p) for p in teacher.parameters()), *teacher.buffers()):
            if id(tensor) not in visitors:
                tensor.data = tensor.data.to(device)
        logger.info(f'The teacher lives on the host; {host_copy.bytes / 2**30:.2f} GiB come to the device with each visit.')
        return host_copy

    def _teacher_that_answers(self) -> RemoteTeacher | None:
        """The teacher's servers or its engine; None if a local model is all there is."""
        args, engine = self.args, None
        if self._server_urls is None and args.gkd_teacher_engine != 'vllm':
            return None
        if self._server_urls is None:
            engine = TeacherEngine(
                self._teacher_path,
                str(self._bare().model_info.torch_dtype).removeprefix('torch.'),
                self._topk or 0,
                args.gkd_teacher_engine_args,
                name_of_device(self.args.device),
                Path(args.output_dir) / f'teacher_engine_rank{args.process_index}.log',
            )
            engine.wait()
        options = ServerOptions(self._topk or 0, args.gkd_server_timeout, args.gkd_server_retry_seconds, args.gkd_server_in_flight)
        servers = TeacherServers(engine.url if engine else self._server_urls, options, lambda: str(self.state.global_step + 1))
        servers.connect(args.gkd_server_retry_seconds)
        if engine:
            engine.sleep()
        elif args.seq_kd and not servers.sends_scores_with_answers:
            logger.info('swift deploy sends no log-probabilities with its answers: each of them takes a second, scoring request.')
        return RemoteTeacher(servers, self._topk or 0, engine.awake if engine else nullcontext)

    def _loss_options(self) -> LossOptions:
        args = self.args
        temperature = args.temperature if args.gkd_temperature is None else args.gkd_temperature
        weight = args.gkd_loss_weight * (temperature**2 if args.gkd_temperature_squared else 1)
        columns = None
        if self.teacher is not None and self.teacher.bare is not None and self._tokenizer_lengths is not None:
            student, teacher = (OutputHead(model).columns for model in (self._bare(), self.teacher.bare))
            columns = checks.compared_columns(student, teacher, *self._tokenizer_lengths)
            if columns < max(student, teacher):
                logger.info(f'Output heads with {student} (student) and {teacher} (teacher) columns: the first {columns} are compared.')
        if self._topk is not None and columns is not None and self._topk > columns:
            raise OptionError(f'--gkd_logits_topk {self._topk}: the models have {columns} token ids in common; choose fewer.')
        return LossOptions(
            Divergence(args.gkd_divergence, args.beta, temperature, args.gkd_skew), weight, args.sft_alpha, args.gkd_tail, columns
        )

    def _check_dataset_size(self) -> None:
        args = self.args
        if hasattr(self.train_dataset, '__len__'):
            parts = f'{args.per_device_train_batch_size} per device x {args.steps_per_generation} steps x {args.world_size} ranks'
            checks.check_size(len(self.train_dataset), -(-args.generation_batch_size // args.gkd_num_samples), parts)

    def _warn_if_nothing_to_learn(self) -> None:
        """A teacher that is the student, asked the same question, has nothing to say."""
        args = self.args
        starts_equal = self._teacher_is_start or (type(self.teacher) is SharedBase and not self._adapter_has_effect())
        equal = isinstance(self.teacher, LiveStudent | AveragedStudent) or (starts_equal and not args.resume_from_checkpoint)
        if not equal or args.sft_alpha > 0:
            return
        columns = getattr(self.train_dataset, 'column_names', None)
        privileged = columns is None or {'teacher_prompt', 'teacher_images'} & set(columns)
        if privileged or args.gkd_teacher_system is not None or args.gkd_teacher_enable_thinking is not None:
            return
        logger.warning(
            f'NOTHING TO LEARN: the teacher is {self.teacher.description} and sees the same prompt, so both distributions are equal, the '
            'divergence is 0 and so is its gradient. What helps: a column teacher_prompt or teacher_images in the dataset, --adapters '
            'with an adapter to start from, --sft_alpha > 0, or another --teacher_model.'
        )

    def _adapter_has_effect(self) -> bool:
        """Whether the adapter changes the model at the start. A fresh LoRA has B = 0; of other tuners that can't be told."""
        b = [getattr(p, 'ds_tensor', p) for name, p in self._bare().named_parameters() if 'lora_B' in name]
        return not b or any(p.detach().any().item() for p in b)

    # -- who answers -------------------------------------------------------------------------------------------------------------

    def _answers(self) -> dict[Source, cycles.Answer]:
        args = self.args
        answers: dict[Source, cycles.Answer] = {}
        if args.lmbda > 0 or args.gkd_eval_source == STUDENT:
            answers[STUDENT] = self._engine_answers if args.use_vllm else self._student_answers
        if args.seq_kd or args.gkd_eval_source == TEACHER:
            answer = self._teacher_answers if self.answering is None else self._server_answers
            answers[TEACHER] = self._kept(answer) if args.gkd_save_teacher_responses else answer
        return answers

    def _sampling_options(self, source: Source) -> SamplingOptions:
        args = self.args
        temperature, limit = args.temperature, args.max_completion_length
        if source == TEACHER:
            temperature = temperature if args.gkd_teacher_temperature is None else args.gkd_teacher_temperature
            limit = args.gkd_teacher_max_completion_length or limit
        words, vocab_size = tuple(args.stop_words), self.loss.options.vocab_size
        return SamplingOptions(limit, temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, words, vocab_size)

    def _student_answers(self, samples: list[Sample]) -> None:
        def lend():
            return unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, gather_deepspeed3_params=self.args.ds3_gather_for_generation
            )

        self._generate(samples, STUDENT, lend, [self.encoder.student_prompt(sample) for sample in samples])

    def _teacher_answers(self, samples: list[Sample]) -> None:
        @contextmanager
        def lend() -> Iterator[nn.Module]:
            with (
                self.teacher.ready() as model,
                unwrap_model_for_generation(
                    model, self.accelerator, gather_deepspeed3_params=self.teacher_ds3_gather_for_generation
                ) as bare,
            ):
                yield bare

        self._generate(samples, TEACHER, lend, [self.encoder.teacher_prompt(sample) for sample in samples])

    def _server_answers(self, samples: list[Sample]) -> None:
        """A teacher server answers. Every rank calls it, and all of them stop if one has no answer."""
        seeds = [self._seed(s) for s in samples]
        prompts = [self.encoder.question(s, p, prompt_only=True) for s, p in zip(samples, self._encoded_prompts(samples), strict=True)]
        stop_ids = sorted(self._stop_ids())
        with self.metrics.seconds('seconds/generation'):
            self._together(lambda: self.answering.answer(samples, prompts, seeds, self._sampling_options(TEACHER), stop_ids))

    def _kept(self, answer: cycles.Answer) -> cycles.Answer:
        """``answer``, and what was answered in training goes to ``--gkd_save_teacher_responses``."""

        def kept(samples: list[Sample]) -> None:
            try:
                answer(samples)
            except TeacherServerError:  # on every rank; some samples may have their answers
                self._keep(samples)
                raise
            self._keep(samples)

        return kept

    def _keep(self, samples: list[Sample]) -> None:
        """Append rows with the teacher's answers to a dataset on disk. A collective call."""
        if self._cycle_key[0] < 0:  # an evaluation
            return
        lines = [self.encoder.row_with_response(sample) for sample in samples if sample.response is not None]
        self.teacher_responses.append(gather_object(lines))

    def _seed(self, sample: Sample) -> int:
        return sources.sampling_seed(self.args.seed, sample.row.epoch, sample.row.number, sample.source, sample.row.repeat)

    def _encoded_prompts(self, samples: list[Sample]) -> list[dict[str, Any]]:
        with self.template.generate_context():
            return [self.template.encode(self.encoder.teacher_prompt(sample)) for sample in samples]

    def _stop_ids(self) -> set[int]:
        """The ids that end an answer: those of the student's generation config, which ms-swift has brought in line with the template."""
        eos = self._bare().generation_config.eos_token_id
        return set(eos if isinstance(eos, list) else [eos]) - {None}

    def _together(self, ask: Callable[[], None]) -> None:
        """Ask a server on every rank, and raise on every rank if one of them fails. A collective call.

        Raises:
            TeacherServerError: With this rank's reason, or naming the number of other ranks that failed.
        """
        error = None
        try:
            ask()
        except TeacherServerError as caught:
            error = caught
        cycles.stop_together(error, self.args.device, self.state.global_step + 1)

    def _generate(self, samples: list[Sample], source: Source, lend, prompts: list[dict[str, Any]]) -> None:
        """Generate with transformers. Where ranks share the weights, all of them take part if one has a prompt."""
        shared = self.is_fsdp_enabled or is_zero3(self.args.deepspeed) or self.is_teacher_ds3  # ZeRO-1 and 2 leave weights whole
        lockstep = self.accelerator.num_processes > 1 and bool(shared)
        if lockstep and not cycles.total_over_ranks(len(samples), self.args.device):
            return
        if lockstep and not prompts:
            prompts = [{'messages': [{'role': 'user', 'content': 'a'}]}]
        seeds = [self._seed(s) for s in samples] or [0] * len(prompts)
        with self.metrics.seconds('seconds/generation'):
            generator = LocalGenerator(self.template, lend, self.args.device, lockstep, self.args.gkd_generation_tokens)
            responses = generator(prompts, seeds, self._sampling_options(source))
        for sample, response in zip(samples, responses, strict=False):  # a rank's stand-in prompt has no sample
            sample.response = response

    # -- rows to micro-batches -----------------------------------------------------------------------------------------------------

    def _get_data_collator(self, args, template):
        return list

    def _row_loader(self, dataset, batch_size: int, **how):
        args = self.args
        options = {'num_workers': args.dataloader_num_workers}
        if args.dataloader_num_workers > 0:
            options |= {'persistent_workers': args.dataloader_persistent_workers, 'prefetch_factor': args.dataloader_prefetch_factor}
        return row_loader(dataset, batch_size, rank=args.process_index, world_size=args.world_size, **how, **options)

    def get_train_dataloader(self, skip_batches: int = 0):
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return self._row_loader(
            self.train_dataset,
            self._train_batch_size,
            seed=seed if args.train_dataloader_shuffle else None,
            num_samples=args.gkd_num_samples,
            drop_last=args.dataloader_drop_last,
            skip=skip_batches,
            endless=True,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._row_loader(dataset, self.args.eval_batch_size, seed=None, drop_last=False)

    def get_batch_samples(self, epoch_iterator: Iterator[list[Row]], num_batches: int, device) -> tuple[list[MicroBatch], None]:
        """The micro-batches of one optimizer step, encoded, every response in place.

        A generation cycle (``steps_per_generation`` micro-batches) may serve several steps, or a step may need several cycles; either
        way the weights do not change between the first cycle of a step and its last.
        """
        if self._resumed is not None:
            self._ready.extend(self._resumed_cycle(epoch_iterator))
        for number in itertools.count():
            if len(self._ready) >= num_batches:
                break
            cycle = self._next_cycle(epoch_iterator, number)
            if not cycle:
                break
            self._ready.extend(cycle)
        samples = [self._ready.popleft() for _ in range(min(num_batches, len(self._ready)))]
        if self.args.gkd_prefetch and len(self._ready) < num_batches:
            self._begin_next_cycle(epoch_iterator)
        batches = [self.encoder.micro_batch(one) for one in samples]
        self._step_batches = max(len(batches), 1)
        if isinstance(self.teacher, RemoteTeacher) and self.args.gkd_loss_weight > 0:
            try:
                self._ask_teacher(batches)
            except TeacherServerError:
                self._ready.extendleft(reversed(samples))
                self._save_before_leaving()
                raise
        elif self._uses_local_teacher and self.teacher.comes_once and batches:
            self._verify_heads(self.model_wrapped, batches[0].to(self.args.device))
            for batch, signal in zip(batches, self._signals(batches), strict=True):
                batch.signal = signal
        self._count(batches)
        return batches, None

    @property
    def _uses_local_teacher(self) -> bool:
        return isinstance(self.teacher, LocalTeacher) and self.args.gkd_loss_weight > 0

    def _signals(self, batches: list[MicroBatch]) -> list[Signal]:
        """What a local teacher says, in one visit if it lives on the host."""
        host_copy = self.teacher.host_copy
        moved = host_copy.moved if host_copy else 0
        with self.metrics.seconds('seconds/teacher'):
            found = self.teacher.signals((batch.to(self.args.device) for batch in batches), self._call, self._topk_options())
        if host_copy:
            self.metrics.add('teacher/moved_gib', (host_copy.moved - moved) / 2**30, len(batches) / self._step_batches)
        return found

    def _ask_teacher(self, batches: list[MicroBatch]) -> None:
        with self.metrics.seconds('seconds/teacher'):
            self._together(lambda: self.teacher.ask(batches))

    def _save_before_leaving(self) -> None:
        """A checkpoint of the last finished step, with the responses that exist. A collective call."""
        checkpoint = os.path.join(self.args.output_dir, f'checkpoint-{self.state.global_step}')
        complete = os.path.isfile(os.path.join(checkpoint, 'trainer_state.json'))
        if self.accelerator.num_processes > 1:
            complete = bool(cycles.total_over_ranks(int(complete), self.args.device))
        if complete and not self.args.save_only_model:
            cycles.save(checkpoint, list(self._ready))
        elif not complete:
            self._save_checkpoint(self.model_wrapped, None)
        logger.error(f'The run ends here. To go on: --resume_from_checkpoint {checkpoint}')

    def _next_cycle(self, epoch_iterator: Iterator[list[Row]], number: int) -> list[list[Sample]]:
        """A cycle's samples with their responses. Empty at the end of an epoch."""
        if self._begun:
            return self._finish_cycle()
        rows = list(itertools.islice(epoch_iterator, self.args.steps_per_generation))
        self._cycle_key = self.state.global_step, number
        return self._noted(self._with_responses(lambda: self.cycle.samples(rows, self._cycle_key)))

    def _begin_next_cycle(self, epoch_iterator: Iterator[list[Row]]) -> None:
        """``--gkd_prefetch``: the server answers the next cycle while this step trains, from the weights before this step."""
        rows = list(itertools.islice(epoch_iterator, self.args.steps_per_generation))
        if not rows:
            return
        self._cycle_key = self.state.global_step, 1
        self._begun, self._begun_at = self.cycle.drawn(rows, self._cycle_key), self.state.global_step
        self._request_ahead([s for samples in self._begun for s in samples if s.row.counts and s.source == STUDENT])

    def _finish_cycle(self) -> list[list[Sample]]:
        """The cycle that was begun a step ago, with its responses."""
        begun, self._begun = self._begun, []
        return self._noted(self._with_responses(lambda: self.cycle.answer(begun) or begun), student_at=self._begun_at)

    def _resumed_cycle(self, epoch_iterator: Iterator[list[Row]]) -> list[list[Sample]]:
        """What a checkpoint has kept of one."""
        state, self._resumed = self._resumed, None
        rows = list(itertools.islice(epoch_iterator, len(state['micro_batches'])))
        return self._noted(self._with_responses(lambda: cycles.restored(self.cycle, state, rows)))

    def _noted(self, cycle: list[list[Sample]], student_at: int | None = None) -> list[list[Sample]]:
        """The cycle; what was generated for it just now is dated and counted."""
        new = cycles.dated(cycle, self.state.global_step, student_at)
        self.metrics.total('tokens/generated', sum(len(sample.response.token_ids) for sample in new))
        return cycle

    def _with_responses(self, make: Callable[[], list[list[Sample]]]) -> list[list[Sample]]:
        """A cycle; if the teacher's server fails while it is made, what exists of it is in the checkpoint that is left behind."""
        try:
            return make()
        except cycles.Unanswered as failure:
            self._ready.extend(failure.samples)
            self._save_before_leaving()
            raise failure.__cause__ from None

    def _count(self, batches: list[MicroBatch]) -> None:
        """The step's denominator."""
        total = cycles.total_over_ranks(sum(batch.num_tokens for batch in batches), self.args.device)
        self._step_tokens = max(total, 1)
        self._step_losses.clear()
        if batches and total == 0:
            logger.warning(
                f'Step {self.state.global_step + 1}: no token of the whole step is trained '
                f'({", ".join(str(s) for batch in batches for s in batch.samples)}); its gradient is 0.'
            )
        self._add_sample_metrics([sample for batch in batches for sample in batch.samples])
        self.metrics.add('tokens/trained', total / self.accelerator.num_processes, 1 / self.accelerator.num_processes)

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs.to(self.args.device)

    # -- the loss --------------------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch=None) -> torch.Tensor:
        # Some templates patch the model's attention, for the backward pass of checkpointed layers too.
        routing = self.teacher.routing if self._uses_local_teacher else None
        with (
            self.template.forward_context(self.model, inputs.student_inputs),
            routing.replayed() if routing else nullcontext(),
        ):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch=None):
        """This micro-batch's share of the step's loss, times the number of ranks, over which DDP averages."""
        total, outputs, stats = self._sum_over_tokens(model, inputs)
        loss = total / self._step_tokens
        aux = getattr(outputs, 'aux_loss', None)
        if aux is not None and self.aux_loss_enabled:
            loss = loss + self.aux_loss_coef * aux.to(loss.device) * (inputs.num_tokens / self._step_tokens)
        self._add_token_metrics(inputs, stats)
        if self.args.log_completions and stats.divergence is not None:
            for sample, divergence in zip(inputs.samples, stats.divergence.split(inputs.lengths), strict=True):
                sample.divergence = divergence.mean() if len(divergence) else None
        self._step_losses.append((loss.detach(), inputs.samples))
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.stop_on_nan()  # its backward pass takes the optimizer step too
        loss = loss.to(self.args.device) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _sum_over_tokens(self, model: nn.Module, batch: MicroBatch) -> tuple[torch.Tensor, Any, TokenStats]:
        """The loss summed over the micro-batch's tokens. The teacher goes first: its activations are gone when the student's come."""
        self._verify_heads(model, batch)
        stats = TokenStats(detail=self.args.gkd_detailed_metrics and self.teacher is not None)
        signal = None
        if batch.signal is not None:
            signal = batch.signal
        elif self._uses_local_teacher:
            (signal,) = self._signals([batch])
        shared = getattr(self.teacher, 'shared_work', None)
        just_ran = batch.signal is None and self._uses_local_teacher and self.teacher.model is self.model
        with (
            self.metrics.seconds('seconds/student'),
            shared.used(batch) if shared else nullcontext(),
            one_trace(model) if just_ran and self.is_deepspeed_enabled else nullcontext(),
        ):
            total, outputs = self.loss(lambda inputs: model(**self._with_router_logits(inputs)), batch, signal, stats)
        return total, outputs, stats

    def _topk_options(self) -> TopKOptions | None:
        options = self.loss.options
        return None if self._topk is None else TopKOptions(self._topk, options.divergence.temperature, options.vocab_size)

    def _call(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        with self.template.forward_context(model, inputs):
            return model(**inputs)

    def _with_router_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, 'output_router_logits': True} if self.aux_loss_enabled else inputs

    def _verify_heads(self, model: nn.Module, batch: MicroBatch) -> None:
        """Once, on the first micro-batch: is the list of what models do after their head complete for these two?"""
        if self._heads_verified:
            return
        self._heads_verified = True
        index = torch.linspace(0, batch.student_inputs['input_ids'].numel() - 1, 8, device=self.args.device).long()
        heads = [('student', self.loss.head, lambda: self._call(model, batch.student_inputs), evaluation_mode(self._bare()))]
        if isinstance(self.teacher, AdapterOnBase) or (self.teacher is not None and self.teacher.model not in (None, self.model)):
            heads.append(('teacher', self.teacher.head, lambda: self._call(self.teacher.model, batch.student_inputs), self.teacher.ready()))
        for name, head, forward, ready in heads:
            with ready:  # eval mode in both: dropout would draw from the random numbers of the step
                reason = head.verify(forward, index)
            if reason:
                logger.warning(f'The {name} runs with whole logits, which take more memory, because {reason}.')
        if self.teacher is not None and self.teacher.model is self.model and not isinstance(self.teacher, AdapterOnBase):
            self.teacher.head = self.loss.head

    def stop_on_nan(self) -> None:
        """Raise if this step's loss is not finite on any rank.

        Raises:
            FloatingPointError: Names the step and this rank's samples.
        """
        finite = torch.stack([loss for loss, _ in self._step_losses]).isfinite() if self._step_losses else torch.ones(1).bool()
        bad = cycles.total_over_ranks(int((~finite).sum()), self.args.device)
        if not bad:
            return
        checkpoint = getattr(self.state, 'last_model_checkpoint', None) or 'not written yet'  # ms-swift sets it with the first one
        mine = [str(sample) for (_, samples), ok in zip(self._step_losses, finite.tolist(), strict=False) if not ok for sample in samples]
        raise FloatingPointError(
            f'The loss of step {self.state.global_step + 1} is not finite in {bad} micro-batches'
            + (f', here with {", ".join(mine)}' if mine else ' of other ranks')
            + f'. The weights are those of step {self.state.global_step}; the last checkpoint is {checkpoint}. '
            'Look at these rows, or lower --learning_rate.'
        )

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval'):
        """The mean over all trained tokens of the whole set, the same for any batch size and number of ranks: no coin is tossed."""
        if self._begun:  # the server has to be free
            self._ready.extend(self._finish_cycle())
        model = self._prepared_for_evaluation()
        training, self.metrics = self.metrics, Metrics(self.args.device)
        try:
            sums, left_out = self._evaluated(model, dataloader)
        finally:
            self.metrics = training
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # the root stays whole until a backward pass; an optimizer made now would get those tensors
        if left_out:
            logger.warning(
                f'{left_out} rows of the evaluation set cannot be encoded (--max_length {self.template.max_length}) and are left out.'
            )
        loss, divergence, cross_entropy, tokens, rows = sums.tolist()
        count = max(tokens, 1)
        metrics = {
            f'{metric_key_prefix}_loss': loss / count,
            f'{metric_key_prefix}_divergence': divergence / count,
            f'{metric_key_prefix}_cross_entropy': cross_entropy / count,
            f'{metric_key_prefix}_tokens': int(tokens),
        }
        if self.teacher is None or self.args.gkd_loss_weight == 0:
            del metrics[f'{metric_key_prefix}_divergence']
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(rows))

    def _evaluated(self, model: nn.Module, dataloader) -> tuple[torch.Tensor, int]:
        """Sums over all ranks of loss, divergence, cross-entropy, tokens and rows, and the number of rows that were left out."""
        source: Source = self.args.gkd_eval_source
        sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        left_out = 0
        for number, rows in enumerate(dataloader):
            self._cycle_key = -1, number  # the seeds of an engine's requests, the same at every evaluation
            samples = [self._eval_sample(row, source) for row in rows]
            left_out += sum(row.counts and not sample.row.counts for row, sample in zip(rows, samples, strict=True))
            if source in (STUDENT, TEACHER):
                self.cycle.answers[source]([sample for sample in samples if sample.row.counts])
            batch = self.encoder.micro_batch(samples).to(self.args.device)
            if isinstance(self.teacher, RemoteTeacher) and self.args.gkd_loss_weight > 0:
                self._ask_teacher([batch])
            with torch.no_grad(), self.template.forward_context(self.model, batch.student_inputs):
                total, _, stats = self._sum_over_tokens(model, batch)
            counted = [sums.new_tensor(batch.num_tokens), sums.new_tensor(sum(sample.row.counts for sample in samples))]
            sums += torch.stack([self._sum(total), self._sum(stats.divergence), self._sum(stats.cross_entropy), *counted])
        if dist.is_initialized():
            dist.all_reduce(sums)
        return sums, cycles.total_over_ranks(left_out, self.args.device)

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

    def _eval_sample(self, row: Row, source: Source) -> Sample:
        """No row stands in for another here: the set stays what it is."""
        sample = Sample(row, row.content, source if row.counts else DATASET)
        if row.counts:
            try:
                self.encoder.check(sample)
            except Exception as error:  # see Cycle.sample
                logger.warning(f'evaluation: {sample} cannot be encoded: {error}')
                sample = Sample(row.filler(), row.content)
        return sample

    # -- metrics ---------------------------------------------------------------------------------------------------------------------

    def _sum(self, values: torch.Tensor | None) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.float64, device=self.args.device)
        return zero if values is None else values.double().sum().to(self.args.device)

    def _add_token_metrics(self, batch: MicroBatch, stats: TokenStats) -> None:
        count = batch.num_tokens
        if stats.divergence is not None:
            self.metrics.add('divergence', self._sum(stats.divergence), count)
        imitated = batch.imitated.to(self.args.device)
        if stats.cross_entropy is not None:
            self.metrics.add('cross_entropy', self._sum(stats.cross_entropy.to(self.args.device) * imitated), imitated.sum())
        if stats.detail:
            for name in (
                'forward_kl',
                'reverse_kl',
                'student_entropy',
                'teacher_entropy',
                'top1_agreement',
                'teacher_prob_of_label',
                'student_mass_on_topk',
            ):
                values = getattr(stats, name)
                if values is not None:
                    self.metrics.add(name, self._sum(values), count)

    def _add_sample_metrics(self, samples: list[Sample]) -> None:
        samples = [sample for sample in samples if sample.row.counts]
        for source in sources.ALL_SOURCES:
            self.metrics.add(f'source/{source}', sum(sample.source == source for sample in samples), len(samples))
        for sample in samples:
            if sample.response is not None:
                self.metrics.add('response/length', len(sample.response.token_ids))
                self.metrics.add('response/cut_off', sample.response.cut_off)

    def write_completions(self) -> None:
        """One line per generated response of this step into completions.jsonl. A collective call."""
        lines = [
            {
                'step': self.state.global_step + 1,
                'generated_at': sample.generated_at,
                'row': sample.row.number,
                'epoch': sample.row.epoch,
                'source': sample.source,
                'prompt': self.encoder.student_prompt(sample)['messages'],
                'completion': self.template.safe_decode(sample.response.token_ids),
                'length': len(sample.response.token_ids),
                'finish_reason': sample.response.finish_reason,
                'divergence': None if sample.divergence is None else sample.divergence.item(),
            }
            for _, samples in self._step_losses
            for sample in samples
            if sample.row.counts and sample.response is not None
        ]
        self.completions.append(gather_object(lines))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if 'loss' in logs:
            metrics = self.metrics.pop()
            tokens = metrics.pop('tokens/generated', 0)
            if tokens:
                seconds = metrics['seconds/generation'] - metrics.get('seconds/weight_sync', 0)
                metrics['generation/tokens_per_second'] = tokens / seconds
            logs.update(metrics)
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: MicroBatch) -> int:
        return super().floating_point_ops(inputs.student_inputs)

    def _track_num_input_tokens(self, inputs: MicroBatch) -> None:
        super()._track_num_input_tokens(inputs.student_inputs)

    # -- checkpoints -------------------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._ready.clear()
        self._resumed = None
        resume = None if self.args.resume_only_model else resume_from_checkpoint or self.args.resume_from_checkpoint
        if resume and not self.args.ignore_data_skip:
            self._resumed = cycles.load(resume)
        self.resumes_from = resume or None
        if self.aux_loss_enabled:
            HfConfigFactory.set_config_attr(self._bare().config, 'router_aux_loss_coef', self.aux_loss_coef)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        if self._begun:
            self._ready.extend(self._finish_cycle())
        if not self.args.save_only_model:
            # Before the rest: a checkpoint that looks complete has to be.
            checkpoint = os.path.join(self.args.output_dir, f'checkpoint-{self.state.global_step}')
            cycles.save(checkpoint, list(self._ready))
            if isinstance(self.teacher, AveragedStudent):
                self.teacher.average.save(checkpoint, writes=self.args.should_save)
        return super()._save_checkpoint(*args, **kwargs)
