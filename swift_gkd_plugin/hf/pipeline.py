"""``swift rlhf --rlhf_type gkd`` before the trainer: what can be wrong is found before any weights load."""

from __future__ import annotations

import atexit
import math
import os
from typing import Any

import torch.distributed as dist
from swift.pipelines.train.rlhf import SwiftRLHF

from .. import checks
from ..arguments import OPTION_NAMES, OptionError, engine_scores, teacher_offload
from ..memory.verdict import Card
from ..rewards import rewards_of
from ..step.remote import check_servers
from ..step.samples import with_used_columns
from ..teachers.adapters import add_frozen_adapter
from ..teachers.average import average_of
from ..unused import ONLY_IN_ENGINE, Entry, say_unused, teacher_is_idle
from .loading import TeacherLoading
from .memory import foretell
from .reward_models import Named, check, loaded
from .teachers import TEACHER_ADAPTER
from .zero3 import why_not_averaged

# What has no effect with this back end.
NOT_USED: tuple[Entry, ...] = (
    ('use_liger_kernel', lambda a: True, "its fused JSD is replaced by the plugin's; its other kernels are used"),
    ('gkd_on_missing_engine', lambda a: True, 'without an engine transformers generates'),
    ('teacher_deepspeed', lambda a: a.teacher_model is None, 'the teacher is the student itself, with its --deepspeed'),
    ('teacher_deepspeed', lambda a: a.teacher_model is not None and not a.deepspeed, 'it needs --deepspeed for the student'),
    *(
        (name, lambda a: a.teacher_model is None, 'the teacher is the student itself, or elsewhere')
        for name in ('teacher_quant_method', 'teacher_quant_bits', 'teacher_device_map', 'teacher_max_memory')
    ),
    *(
        (name, engine_scores, ONLY_IN_ENGINE)
        for name in (
            'teacher_quant_method',
            'teacher_quant_bits',
            'teacher_device_map',
            'teacher_max_memory',
            'teacher_deepspeed',
            'offload_teacher_model',
            'gkd_teacher_offload',
        )
    ),
    *(
        (name, lambda a: a.tuner_type != 'full', 'with an adapter the rest of the model is frozen')
        for name in ('freeze_parameters', 'freeze_parameters_ratio', 'freeze_parameters_regex')
    ),
    *(
        (name, lambda a: a.tuner_type != 'full', 'it belongs to --tuner_type full; see --modules_to_save')
        for name in ('trainable_parameters', 'trainable_parameters_regex')
    ),
    ('router_aux_loss_coef', lambda a: not a.model_info.is_moe_model, 'the student has no router'),
    *((name, lambda a: True, 'it belongs to `megatron rlhf`') for name in OPTION_NAMES if name.endswith('_parallel_size')),
    ('gkd_optimizer_offload', lambda a: True, "it belongs to `megatron rlhf`; DeepSpeed's offload_optimizer keeps it on the host"),
    (
        'gkd_micro_batch_tokens',
        lambda a: True,
        "it belongs to `megatron rlhf`; transformers' loop runs --gradient_accumulation_steps micro-batches",
    ),
    (
        'train_sampling_strategy',
        lambda a: True,
        'rows come in random order or in that of the dataset; see --train_dataloader_shuffle',
    ),
    ('structured_outputs_regex', lambda a: not a.use_vllm, 'it needs --use_vllm true'),
    ('num_beams', lambda a: True, 'responses are sampled, or greedy at --temperature 0'),
    ('predict_with_generate', lambda a: True, 'evaluation measures the loss; see --gkd_eval_source'),
    ('eval_metric', lambda a: True, 'evaluation measures the loss'),
    ('acc_strategy', lambda a: True, 'no accuracy is computed; --gkd_detailed_metrics logs the agreement with the teacher'),
    ('label_smoothing_factor', lambda a: True, 'it belongs to SFT'),
    ('average_tokens_across_devices', lambda a: True, 'tokens always count over all ranks'),
    ('use_logits_to_keep', lambda a: True, 'logits are made for trained tokens only'),
    ('logging_nan_inf_filter', lambda a: True, 'a loss that is not finite stops the run'),
)


class GKDPipeline(SwiftRLHF):
    """ms-swift's pipeline, with start-up checks in front of the models.

    The checks are ``check_options``, ``load_datasets``, ``check_rewards`` and ``compare_tokens``, in this order; ``swift-gkd doctor`` makes
    the same ones without a run.

    Attributes:
        datasets: For training and for validation.
        teacher_loading: How a separate teacher is loaded; None without one.
        tokens: Lengths of the student's and the teacher's tokenizer; None if no other model is loaded.
    """

    def run(self):
        result = super().run()
        atexit.register(_leave_process_group)
        return result

    def _prepare_model_tokenizer(self) -> None:
        self.check_options()
        self.load_datasets()
        self.check_rewards()
        self.compare_tokens()
        foretell(self.args, self.prepare_model, self.teacher_loading and self.teacher_loading.info, Card.of_this_rank())
        models, self.args.reward_model = self.args.reward_model, None  # ms-swift loads one without a template for all but grpo
        super()._prepare_model_tokenizer()
        self.args.reward_model = models
        if models:
            self._rewards.take(list(loaded(self.args, self._load_reward_model)))

    def _load_reward_model(self, one: Named):
        models, self.args.reward_model = self.args.reward_model, one.path
        try:
            return super()._prepare_single_model('reward', None, one.model_type, one.revision)
        finally:
            self.args.reward_model = models

    def _prepare_single_model(self, key, *args):
        # An engine that scores holds the teacher's only copy.
        if key == 'teacher' and engine_scores(self.args):
            return None
        if key != 'teacher' or self.args.teacher_model is None:
            return super()._prepare_single_model(key, *args)
        with self.teacher_loading.settings():
            teacher = super()._prepare_single_model(key, *args)
        self.teacher_loading.check_loaded(teacher[0])
        return teacher

    @classmethod
    def prepare_model(cls, args, model, **kwargs):
        model = super().prepare_model(args, model, **kwargs)
        if args._adapter_on_base:
            add_frozen_adapter(model, args._adapter_on_base, TEACHER_ADAPTER)
        return model

    def load_datasets(self) -> None:
        self.datasets = None, None
        if self.args.dataset or self.args.val_dataset:  # cached ones are loaded by ms-swift
            self.datasets = with_used_columns(self.args, super()._get_dataset)
        checks.check_datasets(self.args, *self.datasets)

    def _get_dataset(self):
        return self.datasets

    def check_options(self) -> None:
        args = self.args
        if args.multi_turn_scheduler and not args.use_vllm:
            raise OptionError(f'--multi_turn_scheduler {args.multi_turn_scheduler} needs an engine: add --use_vllm true with --vllm_mode.')
        if args.task_type != 'causal_lm':
            raise OptionError(f'--task_type {args.task_type}: distillation compares the next tokens of two models; use causal_lm.')
        if args.gkd_self_teacher == 'ema':
            self._check_average()
        if args.gkd_routing == 'teacher':
            self._check_routing()
        if len(args.adapters) > 1:
            raise OptionError(
                f'--adapters has {len(args.adapters)} adapters; training starts from one, merge the others into the model first '
                '(swift export --merge_lora true).'
            )
        fresh = args.tuner_type == 'lora' and not (args.adapters or args.resume_from_checkpoint)
        if args.target_parameters and fresh and args.lora_dropout:
            raise OptionError(
                f'--target_parameters with --lora_dropout {args.lora_dropout}: PEFT has no dropout for parameters; add --lora_dropout 0.'
            )
        if teacher_offload(args) and args.teacher_model is not None:
            self._check_offload(teacher_offload(args))
        self.teacher_loading = TeacherLoading(args) if args.teacher_model is not None else None
        checks.check_student_engine(args)
        checks.check_teacher_engine(args)
        checks.check_topk(args)
        say_unused(args, NOT_USED)
        if teacher_is_idle(args):  # ms-swift would load it all the same
            args.teacher_model = self.teacher_loading = None

    def check_rewards(self) -> None:
        """A run may go on after any step, with another generation batch where the last one ended; a stream begins again after any
        micro-batch, and --dataloader_drop_last ends an epoch after one."""
        training = self.args.training_args
        rows, which = training.per_device_train_batch_size * training.world_size, 'micro-batch of all ranks'
        if not (self.args.streaming or training.dataloader_drop_last):
            rows *= math.gcd(training.gradient_accumulation_steps, training.steps_per_generation)
            which = 'step and of a generation batch'
        check(self.args)
        factors = '--per_device_train_batch_size, --gradient_accumulation_steps, --steps_per_generation, ranks'
        self._rewards = rewards_of(self.args, rows, f'the rows of a {which} ({factors})', *self.datasets)

    def compare_tokens(self) -> None:
        """Finds the lengths of the student's and the teacher's tokenizer; None if no other model is loaded."""
        args, self.tokens = self.args, None
        if args.teacher_model is None and args.teacher_model_server is None:
            return
        _, student = args.get_model_processor(load_model=False)
        check_servers(args, getattr(student, 'tokenizer', student), self.datasets)
        self.tokens = checks.tokenizer_lengths(args, student)

    def _check_average(self) -> None:
        args = self.args
        where = why_not_averaged(args.deepspeed)
        if where is not None:
            raise OptionError(f'--gkd_self_teacher ema with {where}.')
        if args.resume_from_checkpoint and not args.resume_only_model:
            average_of(args.resume_from_checkpoint)

    def _check_routing(self) -> None:
        args = self.args
        if not args.model_info.is_moe_model:
            raise OptionError(f'--gkd_routing teacher: {args.model} has no routed experts; leave it out.')
        if engine_scores(args):
            raise OptionError('--gkd_routing teacher with --gkd_teacher_engine vllm: an engine does not say which experts it chose.')
        if args.training_args.torch_compile:
            raise OptionError('--gkd_routing teacher with --torch_compile: routers that replay a choice cannot be compiled; leave one out.')
        if args.teacher_model is not None and teacher_offload(args) == 'model':
            raise OptionError(
                '--gkd_routing teacher with a teacher that looks at a whole step in one visit: use --gkd_teacher_offload layer, or none.'
            )

    def _check_offload(self, how: str) -> None:
        args = self.args
        if args.fsdp:
            raise OptionError(
                f'--gkd_teacher_offload {how} with --fsdp: FSDP2 moves its own shards; leave the option out, or use --teacher_model_server.'
            )
        if how == 'layer' and args.deepspeed:
            raise OptionError('--gkd_teacher_offload layer with --deepspeed: use --teacher_deepspeed zero3_offload, or model.')
        answers = args.seq_kd or args.gkd_eval_source == 'teacher'
        if how == 'layer' and answers and args.gkd_teacher_engine == 'transformers':
            raise OptionError(
                '--gkd_teacher_offload layer with --seq_kd: every token of an answer would move the whole teacher; use '
                '--gkd_teacher_offload model, --gkd_teacher_engine vllm or --teacher_model_server.'
            )

    def _adapter_is_start(self) -> bool:
        """Whether the teacher has the adapter that the student starts from."""
        args = self.args
        return bool(args._adapter_on_base and args.adapters) and os.path.samefile(args._adapter_on_base, args.adapters[0])

    def _get_trainer_kwargs(self) -> dict[str, Any]:
        args = self.args
        return {
            **super()._get_trainer_kwargs(),
            'tokenizer_lengths': self.tokens,
            'teacher_path': args.teacher_model,
            'rewards': self._rewards,
            'teacher_is_start': self._adapter_is_start() or checks.teacher_is_start(args),
        }


def _leave_process_group() -> None:
    """Ends the threads of the process group before the interpreter does, which may abort a rank whose work is done.

    ms-swift 4.6 never leaves the group of a transformers run; after a failure that is right, for other ranks may wait in it.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
