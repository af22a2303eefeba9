"""GKD on megatron-core. One optimizer step, from top to bottom:

    rows -> sources -> responses -> encode -> teacher -> divergence -> one number

:meth:`GKDTrainer._replace_data_iterator` brings an optimizer step's rows to the point where every response exists, is encoded and has
been looked at by the teacher. :meth:`GKDTrainer.forward_step` runs inside megatron-core's schedule and sums each micro-batch's loss;
megatron-core divides the gradient by the trained tokens of the whole step, over all data- and context-parallel ranks: the step is the
same however it is split.

Ranks that differ in tensor, context or pipeline parallelism alone work on the same rows. Each of them draws, encodes and numbers the rows
itself, which is cheaper than sending them around.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from swift.megatron.callbacks.print import PrintCallback
from swift.megatron.model import get_mcore_model
from swift.megatron.trainers.gkd_trainer import MegatronGKDTrainer
from swift.megatron.trainers.rlhf_mixin import MegatronRLHFTrainer
from swift.megatron.trainers.rollout_mixin import MegatronRolloutMixin
from swift.megatron.utils import disable_forward_pre_hook, enable_forward_pre_hook, maybe_finalize_async_save
from swift.rl_core.data import GKDSample
from swift.template import update_generation_config_eos_token
from swift.utils import JsonlWriter, get_current_device, get_logger
from torch import nn
from transformers import AutoConfig, GenerationConfig

from .. import activation, checks, sources
from ..arguments import OptionError, engine_scores, teacher_offload
from ..divergence import Divergence, TokenStats
from ..metrics import Metrics
from ..responses import Response, SamplingOptions
from ..responses.local import inference_template
from ..sources import DATASET, STUDENT, TEACHER, Source
from ..step import cycle as cycles
from ..step.cycle import Cycle
from ..step.data import Row, row_loader
from ..step.objective import LossOptions
from ..step.remote import RemoteTeacher
from ..step.samples import MicroBatch, Sample, SampleEncoder, TeacherView, check_one_each, sampled_ids
from ..teachers import Signal, TopK, TopKOptions
from ..teachers.engine import TeacherEngine, name_of_device
from ..teachers.server import Scores, ServerOptions, TeacherServerError, TeacherServers
from .generation import Generator, check_generates
from .head import OutputHead, mark_shards
from .layouts import Layout, RandomState, RelocatedTeacher, common_padding
from .loss import DistillationLoss
from .options import loads_teacher, num_experts, said_once, teacher_arguments, teacher_options
from .teachers import LiveStudent, LocalTeacher, SharedBase
from .views import LocalView, local_view

logger = get_logger()

# A micro-batch on its way through the schedule, with what the teacher says about it.
Step = tuple[MicroBatch, Signal | None]


class GKDTrainer(MegatronRolloutMixin, MegatronRLHFTrainer):
    """Generalized Knowledge Distillation (Agarwal et al., 2024, arXiv 2306.13649) for Megatron-SWIFT.

    Args:
        args: ms-swift's arguments, which Megatron-SWIFT hands over whole.
        template: The student's template.
        kwargs: What ms-swift's pipeline passes to its own trainer, and ``tokenizer_lengths``, the lengths of the student's and the
            teacher's tokenizer (None if there is no other model).
    """

    sample_cls = MegatronGKDTrainer.sample_cls

    def __init__(self, args, template, **kwargs):
        self.vllm_client = kwargs.pop('vllm_client', None)
        self._tokenizer_lengths = kwargs.pop('tokenizer_lengths', None)
        self.args = args
        self.steps_per_generation = args.steps_per_generation
        # ms-swift would make its own client of it, with vLLM installed.
        server_urls, args.teacher_model_server = args.teacher_model_server, None
        self._setup_teacher()
        args.teacher_model_server = server_urls
        super().__init__(args, template, **kwargs)
        logger.info(activation.banner(type(self)))
        self.device = args.device = get_current_device()  # transformers' arguments have it, and Cycle asks for it
        self.metrics = Metrics(torch.device(self.device))
        self.completions = JsonlWriter(os.path.join(args.output_dir, 'completions.jsonl'), write_on_rank='last')
        if args.gkd_save_teacher_responses:
            self.teacher_responses = JsonlWriter(args.gkd_save_teacher_responses, write_on_rank='last')
        # Sequence and context parallelism cut sequences into equal parts.
        padding_to, template.sequence_parallel_size = common_padding(args, *([self.teacher_layout.args] if self.teacher_layout else []))
        template.data_collator = partial(template.data_collator, padding_to=padding_to)

        self._rollout_group, self._rollout_groups_created = None, False  # ms-swift's, which it sets with its engine
        self.answering = self._teacher_that_answers() if self._needs_teacher else None
        self.teacher = self._resolve_teacher() if self._needs_teacher else None
        head = OutputHead(self.unwrapped_models)
        self.loss = DistillationLoss(self._loss_options(head), head, self.teacher.adapter if self.teacher else True)
        view = TeacherView(args.gkd_teacher_system, args.gkd_teacher_enable_thinking)
        tag_key = args.teacher_tag_key if isinstance(self.teacher, RemoteTeacher) else None
        self.encoder = SampleEncoder(template, view, self.teacher is not None, tag_key)
        self._init_rollout_engine()

        self._ready: deque[list[Sample]] = deque()  # micro-batches that have their responses and wait for their optimizer step
        self._resumed: dict[str, Any] | None = None  # what the checkpoint has kept of those
        self._begun: list[list[Sample]] = []  # the cycle that the rollout server answers while a step trains
        self._requested: list[GKDSample] | None = None  # this rank's share of what it was asked for
        self._ahead: Future | None = None  # of the last rank: its answers
        self._cycle_key = 0, 0  # optimizer step and number of the cycle in it
        self._step_losses: list[tuple[torch.Tensor, list[Sample]]] = []

    # -- what is trained, and by whom ------------------------------------------------------------------------------------------

    @property
    def _needs_teacher(self) -> bool:
        return self.args.gkd_loss_weight > 0 or self.args.seq_kd or self.args.gkd_eval_source == TEACHER

    def prepare_model(self) -> None:
        super().prepare_model()
        if self.teacher_models is not None:
            self._load_teacher(self.teacher_models)

    def _prepare_peft_model(self, models: list[nn.Module]) -> list[nn.Module]:
        # Every model is built, and looked at, before any weights load.
        args = self.args
        self.teacher_models = self.teacher_layout = None
        if loads_teacher(args):
            numbers = RandomState()  # the student's adapter is drawn as if there were no other model
            self.teacher_models = self._build_teacher()
            numbers.restore()
        with said_once():
            if not args.use_vllm and (args.lmbda > 0 or args.gkd_eval_source == STUDENT):
                check_generates(models, f'--model {args.model}')
            elsewhere = args.teacher_model_server is not None or args.gkd_teacher_engine == 'vllm'
            if not elsewhere and (args.seq_kd or args.gkd_eval_source == TEACHER):
                check_generates(self.teacher_models or models, f'--teacher_model {args.teacher_model or args.model}')
        peft_models = super()._prepare_peft_model(models)
        mark_shards(models)
        return peft_models

    def _build_teacher(self) -> list[nn.Module]:
        """The teacher, built from its own family and configuration, in the student's layout or in its own (``self.teacher_layout``)."""
        config = AutoConfig.from_pretrained(self.args.teacher_model_dir, trust_remote_code=True)
        args = teacher_arguments(self.args, bool(num_experts(config)))
        args.model, args.model_dir, args.model_type = args.teacher_model, args.teacher_model_dir, args.teacher_model_type
        args.model_info, args.model_meta = args.teacher_model_info, args.teacher_model_meta
        args.megatron_model_meta = args.teacher_megatron_model_meta
        args.is_multimodal = args.teacher_model_meta.is_multimodal
        args.rope_scaling = None  # the student's, and the teacher's configuration has its own
        self.teacher_layout = Layout(args) if teacher_options(args) else None
        with self.teacher_layout.entered() if self.teacher_layout else nullcontext():
            return get_mcore_model(args, config)

    def _load_teacher(self, chunks: list[nn.Module]) -> None:
        with self.teacher_layout.entered() if self.teacher_layout else nullcontext():
            for chunk in chunks:
                if not self.args.use_cpu_initialization:
                    chunk.to(get_current_device())
                chunk.requires_grad_(False).eval()
            chunks[0].config.bridge.load_weights(chunks, self.args.teacher_model_dir)

    def _teacher_that_answers(self) -> RemoteTeacher | None:
        """The teacher's servers or its engines; None if a model of the training processes is all there is."""
        args, engine, url = self.args, None, self.args.teacher_model_server
        if url is None:
            scores = engine_scores(args) and args.gkd_loss_weight > 0
            if args.gkd_teacher_engine != 'vllm' or not (scores or args.seq_kd or args.gkd_eval_source == TEACHER):
                return None
            engine, url = self._engine_of_teacher()
        topk = args.gkd_logits_topk or 0
        options = ServerOptions(topk, args.gkd_server_timeout, args.gkd_server_retry_seconds, args.gkd_server_in_flight)
        servers = TeacherServers(url, options, lambda: str(self.state.iteration + 1))

        def connect() -> None:
            servers.connect(args.gkd_server_retry_seconds)
            if engine is not None:
                engine.sleep()

        self._asked_once(connect, lambda: None, lambda _: None)
        return RemoteTeacher(servers, topk, engine.awake if engine is not None else nullcontext)

    def _engine_of_teacher(self) -> tuple[TeacherEngine | None, str]:
        """An engine for the ranks with the same rows, and its address. It belongs to the first of them, which asks for all, and may use the
        devices of those that are on the same machine."""
        args, group = self.args, self._get_rollout_group()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        here = socket.gethostname(), name_of_device(torch.device(self.device))
        dist.all_gather_object(everyone, here, group=group)
        devices = None if here[1] is None else [name for host, names in everyone if host == here[0] for name in names]
        started: list[TeacherEngine] = []
        urls: list[str] = []

        def start() -> None:
            log = Path(args.output_dir) / f'teacher_engine_rank{dist.get_rank()}.log'
            dtype = str(args.torch_dtype).removeprefix('torch.')
            started.append(
                TeacherEngine(args.teacher_model_dir, dtype, args.gkd_logits_topk or 0, args.gkd_teacher_engine_args, devices, log)
            )
            started[0].wait()

        self._asked_once(start, lambda: started[0].url, urls.append)
        return started[0] if started else None, urls[0]

    def _resolve_teacher(self) -> LocalTeacher | RemoteTeacher:
        if self.answering is not None and self.teacher_models is None:
            teacher = self.answering  # it scores as well
        elif self.teacher_layout is not None:
            teacher = RelocatedTeacher(self.args, self.teacher_layout, self.teacher_models, bool(teacher_offload(self.args)))
        elif self.teacher_models is not None:
            teacher = LocalTeacher(self.args, self.teacher_models, bool(teacher_offload(self.args)))
        else:
            kind = SharedBase if self._teacher_use_disable_adapter else LiveStudent
            teacher = kind(self.args, self.unwrapped_models)
        logger.info(f'Student: {type(self.unwrapped_models[0]).__name__}; teacher: {teacher.description}.')
        return teacher

    def _loss_options(self, student: OutputHead) -> LossOptions:
        args = self.args
        temperature = args.temperature if args.gkd_temperature is None else args.gkd_temperature
        weight = args.gkd_loss_weight * (temperature**2 if args.gkd_temperature_squared else 1)
        columns = student.columns
        if self.teacher_models is not None and self._tokenizer_lengths is not None:
            teacher = self.teacher.head.columns
            columns = checks.compared_columns(student.columns, teacher, *self._tokenizer_lengths)
            if columns < max(student.columns, teacher):
                logger.info(
                    f'Output heads with {student.columns} (student) and {teacher} (teacher) columns: the first {columns} are compared.'
                )
        if args.gkd_logits_topk is not None and args.gkd_logits_topk > columns:
            raise OptionError(f'--gkd_logits_topk {args.gkd_logits_topk}: the models have {columns} token ids in common; choose fewer.')
        return LossOptions(
            Divergence(args.gkd_divergence, args.beta, temperature, args.gkd_skew), weight, args.sft_alpha, args.gkd_tail, columns
        )

    # -- who answers -------------------------------------------------------------------------------------------------------------

    def _init_rollout_engine(self) -> None:
        # ms-swift makes none at --lmbda 0 (4.6.0, megatron/trainers/rollout_mixin.py:389), even if evaluations ask it.
        lmbda = self.args.lmbda
        if self.args.gkd_eval_source == STUDENT:
            self.args.lmbda = 1
        try:
            super()._init_rollout_engine()
        finally:
            self.args.lmbda = lmbda

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
        # Megatron-SWIFT has no --min_p.
        words, vocab_size = tuple(args.stop_words or ()), self.loss.options.vocab_size
        return SamplingOptions(limit, temperature, args.top_k, args.top_p, 0.0, args.repetition_penalty, words, vocab_size)

    def _seed(self, sample: Sample) -> int:
        return sources.sampling_seed(self.args.seed, sample.row.epoch, sample.row.number, sample.source, sample.row.repeat)

    def _ending_ids(self, model_dir: str) -> list[int]:
        """The ids that end an answer: those of the model's generation config, brought in line with the template as ms-swift does."""
        try:
            config = GenerationConfig.from_pretrained(model_dir)
        except OSError:
            config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model_dir, trust_remote_code=True))
        update_generation_config_eos_token(config, self.template)
        eos = self.template.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        return eos if isinstance(eos, list) else [eos]

    def _student_answers(self, samples: list[Sample]) -> None:
        @contextmanager
        def lend() -> Iterator[list[nn.Module]]:
            with self._gathered_weights():
                yield self.unwrapped_models

        generator = Generator(self.template, lend, self._ending_ids(self.args.model_dir), self.args.gkd_generation_tokens)
        self._generate(samples, STUDENT, generator, [self.encoder.student_prompt(sample) for sample in samples])

    def _teacher_answers(self, samples: list[Sample]) -> None:
        @contextmanager
        def lend() -> Iterator[list[nn.Module]]:
            with self.teacher.ready():
                yield self.teacher.chunks

        model_dir = self.args.model_dir if self.teacher_models is None else self.args.teacher_model_dir
        generator = Generator(self.template, lend, self._ending_ids(model_dir), self.args.gkd_generation_tokens)
        self._generate(samples, TEACHER, generator, [self.encoder.teacher_prompt(sample) for sample in samples])

    def _server_answers(self, samples: list[Sample]) -> None:
        """A teacher server answers. Every rank calls it, and all of them stop if one has no answer."""
        seeds, stop_ids = [self._seed(s) for s in samples], sorted(self._ending_ids(self.args.model_dir))
        with inference_template(self.template) as template:
            encoded = [template.encode(self.encoder.teacher_prompt(sample)) for sample in samples]
        prompts = [self.encoder.question(s, p, prompt_only=True) for s, p in zip(samples, encoded, strict=True)]

        def take(answers: list[tuple[Response | None, Scores | None]]) -> None:
            for sample, (response, scores) in zip(samples, answers, strict=True):
                sample.response, sample.scores = response, scores

        with self.metrics.seconds('seconds/generation'):
            self._asked_once(
                lambda: self.answering.answer(samples, prompts, seeds, self._sampling_options(TEACHER), stop_ids),
                lambda: [(sample.response, sample.scores) for sample in samples],
                take,
            )

    def _asked_once(self, ask: Callable[[], None], told: Callable[[], Any], take: Callable[[Any], None]) -> None:
        """The first of the ranks with the same rows asks a server, and the others get what it was told, all of it or a part. Every rank
        calls it.

        Raises:
            TeacherServerError: On every rank, if a server gave up.
        """
        group = self._get_rollout_group()
        error, found = None, [None]
        if dist.get_rank(group) == 0:
            try:
                ask()
            except TeacherServerError as caught:
                error = caught
            found = [told()]
        dist.broadcast_object_list(found, dist.get_global_rank(group, 0), group=group)
        take(found[0])
        cycles.stop_together(error, torch.device(self.device), self.state.iteration + 1)

    def _ask_teacher(self, batches: list[MicroBatch]) -> None:
        """Give each micro-batch what a teacher server says about it. A collective call."""

        def take(signals: list[TopK | None]) -> None:
            for batch, signal in zip(batches, signals, strict=True):
                batch.signal = signal

        with self.metrics.seconds('seconds/teacher'):
            self._asked_once(lambda: self.teacher.ask(batches), lambda: [batch.signal for batch in batches], take)

    def _save_before_leaving(self) -> None:
        """A checkpoint of the last finished step, with the responses that exist. A collective call."""
        self._begun = []  # the run that goes on begins it again, from the same weights
        checkpoint = os.path.join(self.args.output_dir, f'checkpoint-{self.state.iteration}')
        # The last file of a checkpoint.
        complete = int(os.path.isfile(os.path.join(checkpoint, 'latest_checkpointed_iteration.txt')))
        if cycles.total_over_ranks(complete, torch.device(self.device)):
            cycles.save(checkpoint, list(self._ready))
        else:
            with self._gathered_weights():
                self.save_checkpoint()
            maybe_finalize_async_save(self.args, blocking=True, terminate=True)
        name = 'mcore_adapter' if self.args.tuner_type == 'lora' else 'mcore_model'
        logger.error(f'The run ends here. To go on: --{name} {checkpoint} --finetune false')

    def _generate(self, samples: list[Sample], source: Source, generator: Generator, prompts: list[dict[str, Any]]) -> None:
        with self.metrics.seconds('seconds/generation'):
            responses = generator(prompts, [self._seed(s) for s in samples], self._sampling_options(source))
        for sample, response in zip(samples, responses, strict=True):
            sample.response = response

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
        self.teacher_responses.append(self._from_everyone(lines))

    def _from_everyone(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What all data-parallel ranks have. A collective call."""
        everyone: list[Any] = [None] * mpu.get_data_parallel_world_size()
        dist.all_gather_object(everyone, lines, group=mpu.get_data_parallel_group())
        return list(itertools.chain.from_iterable(everyone))

    def _engine_answers(self, samples: list[Sample]) -> None:
        """The student answers through ms-swift's rollout (vLLM). Every rank calls it, even with nothing to generate.

        Ranks with the same rows share the prompts out, any number of them.
        """
        if not cycles.total_over_ranks(len(samples), torch.device(self.device)):
            return  # the engine sleeps on, with the weights that it has
        group = self._get_rollout_group()
        everyone: list[Any] = [None] * dist.get_world_size(group)
        with self.metrics.seconds('seconds/generation'):
            if self._requested is not None:
                mine = self._collected()
            else:
                with self._gathered_weights():
                    mine = self._generate_completions(self._share(samples))
            dist.all_gather_object(everyone, mine, group=group)
        for number, sample in enumerate(samples):
            result = everyone[number % len(everyone)][number // len(everyone)]
            sample.generated, sample.response = result, Response(sampled_ids(result), result.finish_reason or 'stop')

    def _share(self, samples: list[Sample]) -> list[GKDSample]:
        """What this rank asks the engine, of the samples that it has in common with others."""
        group = self._get_rollout_group()
        return [self.encoder.inner(sample) for sample in samples[dist.get_rank(group) :: dist.get_world_size(group)]]

    def _request_ahead(self, samples: list[Sample]) -> None:
        """Have the server generate, from the weights of now, while the trainer goes on. A collective call."""
        if not cycles.total_over_ranks(len(samples), torch.device(self.device)):
            return
        if self._last_loaded_step != self._step:
            with self._gathered_weights():
                self._move_model_to_vllm()
            self._last_loaded_step = self._step
        self._requested = self._preprocess_inputs(self._share(samples))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.samples2requests(self._requested))
        self._shares = list(map(len, everyone))
        if self.is_main_process:
            requests, config = list(itertools.chain.from_iterable(everyone)), self._get_request_config()
            self._ahead = self._one_ahead.submit(self.vllm_client.infer, infer_requests=requests, request_config=config)

    @cached_property
    def _one_ahead(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix='rollout-ahead')

    def _collected(self) -> list[GKDSample]:
        """This rank's share of what was requested ahead. A collective call.

        Raises:
            OptionError: The scheduler of the server has made another number of samples.
        """
        requested, self._requested = self._requested, None
        found = [self._ahead.result() if self.is_main_process else None]
        dist.broadcast_object_list(found, src=dist.get_world_size() - 1)
        check_one_each(len(found[0]), sum(self._shares), None)
        first = sum(self._shares[: dist.get_rank()])
        return self._postprocess_rollout_outputs(requested, found[0][first : first + len(requested)])

    @contextmanager
    def _gathered_weights(self) -> Iterator[None]:
        """With --overlap_param_gather a rank has the new weights of the others only when a forward pass has asked for them, too late for
        an engine that gets them now. ms-swift does the same around evaluations and checkpoints."""
        if not self._pre_hook_enabled:
            yield
            return
        disable_forward_pre_hook(self.wrapped_models)
        try:
            yield
        finally:
            enable_forward_pre_hook(self.wrapped_models)

    def _get_request_config(self):
        """The engine's sampling options with a seed of this cycle and this engine; ms-swift adds the request's number to it."""
        config = copy.copy(self.request_config)
        engine = 0 if self.vllm_mode == 'server' else self.process_index // self.vllm_tensor_parallel_size
        step, number = self._cycle_key
        config.seed = sources.sampling_seed(self.args.seed, step, 1000 * number + engine, STUDENT) % 2**31
        return config

    # -- rows to micro-batches -----------------------------------------------------------------------------------------------------

    def _row_loader(self, dataset, **how):
        args = self.args
        options = {'num_workers': args.dataloader_num_workers}
        if args.dataloader_num_workers > 0:
            options |= {'persistent_workers': args.dataloader_persistent_workers, 'prefetch_factor': args.dataloader_prefetch_factor}
        rank, world_size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        return row_loader(dataset, args.micro_batch_size, drop_last=False, rank=rank, world_size=world_size, **how, **options)

    def _training_rows(self, dataset) -> Iterator[list[Row]]:
        """Micro-batches without end. The schedule wants the same number in every step, so the last step of an epoch gets fillers."""
        args, per_step = self.args, self.args.num_microbatches
        seed = args.data_seed if args.train_dataloader_shuffle else None
        loader = self._row_loader(dataset, seed=seed, num_samples=args.gkd_num_samples)
        steps = -(-len(loader) // per_step)
        first, skipped = divmod(self.state.iteration, steps)
        loader.batch_sampler.skip = skipped * per_step
        for epoch in itertools.count(first):
            loader.set_epoch(epoch)
            yield from _filled_up(loader, per_step)
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
        self.config.finalize_model_grads_func = self._finalize_model_grads
        parts = f'{args.micro_batch_size} per micro-batch x {args.generation_batch_size // args.micro_batch_size} of all ranks'
        checks.check_size(len(train_dataset), -(-args.generation_batch_size // args.gkd_num_samples), parts)
        self.cycle = Cycle(args, train_dataset, self.encoder, self._answers())
        checkpoint = args.mcore_model or args.mcore_adapter
        if checkpoint and not args.finetune:
            self._resumed = cycles.load(checkpoint)
        return self._training_rows(train_dataset), val_dataset

    def _replace_data_iterator(self, rows: Iterator[list[Row]]) -> list[Iterator[Step]]:
        """The micro-batches of one optimizer step, encoded, every response in place, with what the teacher says about them.

        A generation cycle is ``steps_per_generation`` optimizer steps long. The teacher looks at one step at a time: its weights can be
        those of the student, and its hidden states take room.
        """
        self._step = self.state.iteration
        if not self._ready:
            self._ready.extend(self._next_cycle(rows))
        samples = [self._ready.popleft() for _ in range(self.args.num_microbatches)]
        if self.args.gkd_prefetch and not self._ready and self.state.iteration + 1 < self.args.train_iters:
            self._begin_next_cycle(rows)
        batches = [self.encoder.micro_batch(one) for one in samples]
        if self._asks_server:
            try:
                self._ask_teacher(batches)
            except TeacherServerError:
                self._ready.extendleft(reversed(samples))
                self._save_before_leaving()
                raise
        self._count(batches)
        if self.args.log_completions:
            self._write_completions([sample for one in samples for sample in one])
        return self._asked(batches)

    @property
    def _asks_server(self) -> bool:
        return isinstance(self.teacher, RemoteTeacher) and self.args.gkd_loss_weight > 0

    def _next_cycle(self, rows: Iterator[list[Row]]) -> list[list[Sample]]:
        """A cycle's samples with their responses; first what a checkpoint has kept of one."""
        if self._begun:
            return self._finish_cycle()
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            kept = list(itertools.islice(rows, len(state['micro_batches'])))
            return self._with_responses(lambda: cycles.restored(self.cycle, state, kept))
        self._cycle_key = self.state.iteration, 0
        cycle = self._rows_of_cycle(rows)
        return self._with_responses(lambda: self.cycle.samples(cycle, self._cycle_key))

    def _rows_of_cycle(self, rows: Iterator[list[Row]]) -> list[list[Row]]:
        return list(itertools.islice(rows, self.args.num_microbatches * self.steps_per_generation))

    def _begin_next_cycle(self, rows: Iterator[list[Row]]) -> None:
        """``--gkd_prefetch``: the server answers the next cycle while this step trains, from the weights before this step."""
        self._cycle_key = self.state.iteration, 1
        self._begun, self._begun_at = self.cycle.drawn(self._rows_of_cycle(rows), self._cycle_key), self.state.iteration
        self._request_ahead([s for samples in self._begun for s in samples if s.row.counts and s.source == STUDENT])

    def _finish_cycle(self) -> list[list[Sample]]:
        """The cycle that was begun a step ago, with its responses."""
        begun, self._begun = self._begun, []
        return self._with_responses(lambda: self.cycle.answer(begun) or begun, student_at=self._begun_at)

    def _with_responses(self, make: Callable[[], list[list[Sample]]], student_at: int | None = None) -> list[list[Sample]]:
        """A cycle, dated; if the teacher's server fails while it is made, what exists of it is in the checkpoint that is left behind."""
        try:
            cycle = make()
        except cycles.Unanswered as failure:
            cycles.dated(failure.samples, self.state.iteration, student_at)
            self._ready.extend(failure.samples)
            self._save_before_leaving()
            raise failure.__cause__ from None
        cycles.dated(cycle, self.state.iteration, student_at)
        return cycle

    def _asked(self, batches: list[MicroBatch]) -> list[Iterator[Step]]:
        """One iterator per virtual stage: all of them run every micro-batch."""
        signals: list[Signal | None] = [batch.signal for batch in batches]
        if isinstance(self.teacher, LocalTeacher) and self.args.gkd_loss_weight > 0:
            with self.metrics.seconds('seconds/teacher'):
                signals = self.teacher.signals(batches, self._topk_options())
            if self.teacher.host_copy is not None:
                self.metrics.add('teacher/moved_gib', self.teacher.host_copy.bytes / 2**30)
        return [iter(list(zip(batches, signals, strict=True))) for _ in self.unwrapped_models]

    def _topk_options(self) -> TopKOptions | None:
        options, k = self.loss.options, self.args.gkd_logits_topk
        return None if k is None else TopKOptions(k, options.divergence.temperature, options.vocab_size)

    def _count(self, batches: list[MicroBatch]) -> None:
        tokens = torch.tensor(sum(batch.num_tokens for batch in batches), device=self.device)
        dist.all_reduce(tokens, group=mpu.get_data_parallel_group())
        self._step_losses.clear()
        if not tokens:
            logger.warning(
                f'Step {self.state.iteration + 1}: no token of the whole step is trained '
                f'({", ".join(str(s) for batch in batches for s in batch.samples)}); its gradient is 0.'
            )
        self._add_sample_metrics([sample for batch in batches for sample in batch.samples])
        self.metrics.add('tokens/trained', tokens)

    # -- the loss --------------------------------------------------------------------------------------------------------------------

    def forward_step(self, data_iterator: Iterator[Step], model: nn.Module):
        """One micro-batch through one chunk of the student. The second value turns its output into the step's sums, on the last stage."""
        batch, signal = next(data_iterator)
        view, output, stats = self._sum_over_tokens(batch, signal, model)
        return output, partial(self.loss_func, batch=batch, view=view, stats=stats)

    def _sum_over_tokens(self, batch: MicroBatch, signal: Signal | None, model: nn.Module) -> tuple[LocalView, torch.Tensor, TokenStats]:
        chunk = self.unwrapped_models[self.wrapped_models.index(model)]
        stats = TokenStats(detail=self.args.gkd_detailed_metrics and self.teacher is not None)
        with self.metrics.seconds('seconds/student'):
            view = local_view(self.args, batch.student_inputs, batch.student_index, chunk.vp_stage)
            if batch.signal is not None and view.here is not None:  # a server's, of all tokens
                signal = dataclasses.replace(signal, logprobs=view.of(signal.logprobs), ids=view.of(signal.ids))
            output = self.loss(lambda inputs: model(**inputs), batch, view, signal, stats)
        return view, output, stats

    def loss_func(self, output: torch.Tensor, *, batch: MicroBatch, view: LocalView, stats: TokenStats):
        """(sum of the loss, number of trained tokens) of what is here of a micro-batch; megatron-core adds both up and divides."""
        total = output.sum()
        self._add_token_metrics(batch, view, stats)
        self.metrics.add('loss', total.detach(), len(view.index))
        self._step_losses.append((total.detach(), batch.samples))
        return total, torch.tensor(len(view.index), dtype=torch.int, device=total.device), {}

    def _finalize_model_grads(self, *args: Any, **kwargs: Any) -> None:
        self._stop_on_nan()
        finalize_model_grads(*args, **kwargs)

    def _stop_on_nan(self) -> None:
        """Raise if this step's loss is not finite on any rank, before any weight takes part in it.

        Raises:
            FloatingPointError: Names the step and this rank's samples.
        """
        mine = [str(sample) for loss, samples in self._step_losses if not loss.isfinite() for sample in samples]
        bad = torch.tensor(len(mine), device=self.device)
        dist.all_reduce(bad)
        if not bad:
            return
        step = self.state.iteration
        raise FloatingPointError(
            f'The loss of step {step + 1} is not finite'
            + (f', here with {", ".join(mine)}' if mine else ' on other ranks')
            + f'. The weights are those of step {step}; the last checkpoint is {self.state.last_model_checkpoint or "not written yet"}. '
            'Look at these rows, or lower --lr.'
        )

    # -- evaluation ------------------------------------------------------------------------------------------------------------------

    def evaluate(self, dataset) -> dict[str, float]:
        """The mean over all trained tokens of the whole set, the same for any batch size and layout: no coin is tossed."""
        if self._begun:  # the server has to be free
            self._ready.extend(self._finish_cycle())
        for model in self.wrapped_models:
            model.eval()
        self.call_event('on_eval_begin')
        training, self.metrics = self.metrics, Metrics(torch.device(self.device))
        try:
            rows, left_out = self._evaluated(dataset)
            sums = self.metrics.pop()
        finally:
            self.metrics = training
        if left_out:
            logger.warning(
                f'{left_out} rows of the evaluation set cannot be encoded (--max_length {self.template.max_length}) and are left out.'
            )
        metrics = {'loss': sums.get('loss', 0.0), 'n_steps': 1}
        if self.teacher is not None:
            metrics['divergence'] = sums.get('divergence', 0.0)
        metrics['cross_entropy'] = sums.get('all_cross_entropy', 0.0)
        metrics['tokens'], metrics['rows'] = int(sums.get('tokens/trained', 0)), rows
        self.on_log(logs=metrics, prefix='eval_')
        self.call_event('on_eval_end')
        return metrics

    def _evaluated(self, dataset) -> tuple[int, int]:
        """Numbers of rows, over all ranks, that were evaluated and that were left out."""
        args, source = self.args, self.args.gkd_eval_source
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        tokens = 0
        loader = iter(_filled_up(self._row_loader(dataset, seed=None), args.num_microbatches))
        answers = self._answers()
        for number in itertools.count():
            micro_batches = list(itertools.islice(loader, args.num_microbatches))
            if not micro_batches:
                break
            self._step, self._cycle_key = self.state.iteration, (-1, number)
            samples = [[self._eval_sample(row, source) for row in rows] for rows in micro_batches]
            everyone = [sample for one in samples for sample in one if sample.row.counts]
            if source != DATASET:
                answers[source](everyone)
            batches = [self.encoder.micro_batch(one) for one in samples]
            if self._asks_server:
                self._ask_teacher(batches)
            counted = sum(row.counts for rows in micro_batches for row in rows)
            counts += torch.tensor([len(everyone), counted - len(everyone)], device=self.device)
            tokens += sum(batch.num_tokens for batch in batches)
            with torch.no_grad():
                get_forward_backward_func()(
                    forward_step_func=self.forward_step,
                    data_iterator=self._asked(batches),
                    model=self.wrapped_models,
                    num_microbatches=args.num_microbatches,
                    seq_length=args.seq_length,
                    micro_batch_size=args.micro_batch_size,
                    forward_only=True,
                )
            self.call_event('on_eval_step')
        everything = torch.cat([counts, counts.new_tensor([tokens])])
        dist.all_reduce(everything, group=mpu.get_data_parallel_group())
        rows, left_out, total = everything.tolist()
        self.metrics.add('tokens/trained', total)
        return rows, left_out

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

    def _add_token_metrics(self, batch: MicroBatch, view: LocalView, stats: TokenStats) -> None:
        count = len(view.index)

        def total(values: torch.Tensor) -> torch.Tensor:
            return values.double().sum()

        if stats.divergence is not None:
            self.metrics.add('divergence', total(stats.divergence), count)
        imitated = view.of(batch.imitated).to(self.device)
        if stats.cross_entropy is not None:
            self.metrics.add('cross_entropy', total(stats.cross_entropy * imitated), imitated.sum())
            if not self.unwrapped_models[0].training:
                self.metrics.add('all_cross_entropy', total(stats.cross_entropy), count)
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
                    self.metrics.add(name, total(values), count)

    def _add_sample_metrics(self, samples: list[Sample]) -> None:
        samples = [sample for sample in samples if sample.row.counts]
        for source in sources.ALL_SOURCES:
            self.metrics.add(f'source/{source}', sum(sample.source == source for sample in samples), len(samples))
        for sample in samples:
            if sample.response is not None:
                self.metrics.add('response/length', len(sample.response.token_ids))
                self.metrics.add('response/cut_off', sample.response.cut_off)

    def _write_completions(self, samples: list[Sample]) -> None:
        """One line per generated response into completions.jsonl. A collective call."""
        lines = [
            {
                'step': self.state.iteration + 1,
                'row': sample.row.number,
                'epoch': sample.row.epoch,
                'source': sample.source,
                'generated_at': sample.generated_at,
                'prompt': self.encoder.student_prompt(sample)['messages'],
                'completion': self.template.safe_decode(sample.response.token_ids),
                'length': len(sample.response.token_ids),
                'finish_reason': sample.response.finish_reason,
            }
            for sample in samples
            if sample.row.counts and sample.response is not None
        ]
        self.completions.append(self._from_everyone(lines))

    def on_log(self, logs: dict[str, Any], prefix: str = '') -> None:
        if not prefix:
            logs.update(self.metrics.pop())
        super().on_log(logs, prefix)

    # -- checkpoints -------------------------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        if self._begun:
            self._ready.extend(self._finish_cycle())
        # Before the rest: a checkpoint that looks complete has to be.
        cycles.save(os.path.join(self.args.output_dir, f'checkpoint-{self.state.iteration}'), list(self._ready))
        super().save_checkpoint()


def _filled_up(micro_batches: Iterator[list[Row]], multiple: int) -> Iterator[list[Row]]:
    """Micro-batches, and after the last one as many fillers as it takes to a multiple."""
    count = 0
    for rows in micro_batches:
        yield rows
        count += 1
    for _ in range(-count % multiple):
        yield [rows[0].filler()]
