"""``megatron rlhf --rlhf_type gkd`` before the trainer: what can be wrong is found before any weights load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch.distributed as dist
from swift.megatron.pipelines.train.rlhf import MegatronRLHF
from swift.utils import get_logger
from transformers import AutoConfig

from .. import checks
from ..arguments import OptionError
from ..step.remote import check_servers
from ..step.samples import with_used_columns
from .options import SIZES, check_layout, check_model, check_teacher, loads_teacher, said_once
from .trainer import GKDTrainer

logger = get_logger()


def _teacher_is_silent(args: Any) -> bool:
    return not args.seq_kd and args.gkd_eval_source != 'teacher'


def _only_engines_have_teacher(args: Any) -> bool:
    return args.teacher_model is not None and not loads_teacher(args)


# Options of ms-swift and of ours that do nothing, or not what they say, in some configuration: name, when, why. Said if they were given.
NOT_USED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ('packing', lambda a: True, 'responses change with every step, so rows are not packed beforehand; it works as --padding_free'),
    ('group_by_length', lambda a: True, 'the length of a response is not known before it is generated; rows come in random order'),
    ('data_sharding', lambda a: True, 'consecutive rows go to the ranks in turn, so that every layout trains on the same steps'),
    ('cached_dataset', lambda a: True, 'rows are encoded again, their cached lengths are not used'),
    ('cached_val_dataset', lambda a: True, 'rows are encoded again, their cached lengths are not used'),
    ('beta', lambda a: a.gkd_divergence != 'jsd' and a.beta != 0.5, 'it belongs to --gkd_divergence jsd'),
    ('gkd_skew', lambda a: 'skew' not in a.gkd_divergence, 'it belongs to the skewed divergences'),
    ('gkd_tail', lambda a: a.gkd_logits_topk is None, 'it belongs to --gkd_logits_topk'),
    ('gkd_logits_topk', lambda a: a.gkd_loss_weight == 0, 'at --gkd_loss_weight 0 no teacher looks at the responses'),
    ('gkd_num_samples', lambda a: a.lmbda == 0 and not a.seq_kd, 'a response of the dataset is there once'),
    ('gkd_save_teacher_responses', lambda a: not a.seq_kd, 'the teacher answers with --seq_kd'),
    (
        'gkd_teacher_engine',
        lambda a: _teacher_is_silent(a) and (a.gkd_logits_topk is None or a.gkd_loss_weight == 0),
        'it answers with --seq_kd, and scores with --gkd_logits_topk',
    ),
    ('gkd_teacher_engine_args', lambda a: a.gkd_teacher_engine != 'vllm', 'it belongs to --gkd_teacher_engine vllm'),
    ('gkd_prefetch', lambda a: a.lmbda == 0, 'at --lmbda 0 the student answers nothing'),
    ('gkd_on_missing_engine', lambda a: a.use_vllm, 'vLLM answers for the student'),
    ('gkd_teacher_temperature', _teacher_is_silent, 'the teacher answers with --seq_kd or --gkd_eval_source teacher'),
    ('gkd_teacher_max_completion_length', _teacher_is_silent, 'the teacher answers with --seq_kd or --gkd_eval_source teacher'),
    ('offload_teacher_model', lambda a: a.teacher_model is None, 'the teacher is the student itself and stays where it is'),
    ('gkd_teacher_offload', lambda a: a.teacher_model is None, 'the teacher is the student itself and stays where it is'),
    *(
        (name, _only_engines_have_teacher, 'no teacher is loaded into the training processes')
        for name in ('offload_teacher_model', 'gkd_teacher_offload', *(f'teacher_{size}' for size in SIZES))
    ),
    ('gkd_ema_decay', lambda a: True, 'it belongs to --gkd_self_teacher ema'),
    ('teacher_tag_key', lambda a: a.teacher_model_server is None, 'it routes samples to teacher servers'),
    ('gkd_server_timeout', lambda a: a.teacher_model_server is None, 'it belongs to --teacher_model_server'),
    ('gkd_server_retry_seconds', lambda a: a.teacher_model_server is None, 'it belongs to --teacher_model_server'),
    ('gkd_server_in_flight', lambda a: a.teacher_model_server is None, 'it belongs to --teacher_model_server'),
    ('loss_type', lambda a: True, '--gkd_divergence chooses the loss'),
    ('enable_dft_loss', lambda a: True, 'it belongs to SFT'),
    ('enable_channel_loss', lambda a: True, 'it belongs to SFT'),
    ('label_smoothing', lambda a: True, 'it belongs to DPO'),
    ('eval_iters', lambda a: a.eval_iters > 0, 'the whole evaluation set is evaluated; 0 switches evaluation off'),
)


class GKDPipeline(MegatronRLHF):
    """ms-swift's pipeline, with start-up checks in front of the models."""

    def run(self) -> dict[str, Any]:
        with said_once():
            self._check_options()
            self._tokens = self._check_tokenizers()
        return super().run()

    def prepare_trainer(self) -> GKDTrainer:
        return GKDTrainer(self.args, self.template, vllm_client=self._prepare_vllm_client(), tokenizer_lengths=self._tokens)

    def _get_dataset(self):
        args = self.args
        train_dataset, val_dataset = with_used_columns(args, super()._get_dataset)
        needed = None if args.lmbda == 1 or args.seq_kd else f'--lmbda {args.lmbda} without --seq_kd trains on responses of the dataset'
        with said_once():
            rows = train_dataset if train_dataset is not None else []
            checks.check_rows(rows, '--dataset', needed, 'let the models answer: --lmbda 1, or --seq_kd true')
            if val_dataset is not None:
                needed = '--gkd_eval_source dataset scores responses of the dataset' if args.gkd_eval_source == 'dataset' else None
                checks.check_rows(val_dataset, '--val_dataset', needed, 'score generated ones: --gkd_eval_source student')
        if args.teacher_model_server is not None:
            self._check_servers(train_dataset, val_dataset)
        return train_dataset, val_dataset

    def _check_servers(self, *datasets) -> None:
        """One rank asks for all of them."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                check_servers(self.args, getattr(self.processor, 'tokenizer', self.processor), datasets)
            except OptionError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        with said_once():
            if problem[0] is not None:
                raise OptionError(problem[0])

    def _check_options(self) -> None:
        args = self.args
        check_layout(args)  # once more: by now it is known whether the teacher is the student's base
        student = AutoConfig.from_pretrained(args.model_dir, trust_remote_code=True)
        check_model('--model', args.model, student, args)
        if loads_teacher(args):
            teacher = AutoConfig.from_pretrained(args.teacher_model_dir, trust_remote_code=True)
            check_teacher(args.teacher_model, teacher, args)
        checks.check_teacher_engine(args)
        vocab = student.get_text_config().vocab_size
        if args.gkd_logits_topk is not None and args.gkd_logits_topk > vocab:
            raise OptionError(f'--gkd_logits_topk {args.gkd_logits_topk}: the student has {vocab} token ids; choose fewer.')
        default = {f.name: f.default for f in fields(args) if f.default is not MISSING}
        for name, applies, why in NOT_USED:
            value = getattr(args, name, None)
            if value not in (None, [], default.get(name)) and applies(args):
                logger.warning(f'--{name} {value} is not used as such: {why}.')

    def _check_tokenizers(self) -> tuple[int, int] | None:
        """Lengths of the student's and the teacher's tokenizer; None if there is no other model."""
        args = self.args
        if args.teacher_model is None:
            return None
        _, teacher = args.get_model_processor(
            model=args.teacher_model, model_type=args.teacher_model_type, revision=args.teacher_model_revision, load_model=False
        )
        student, teacher = (getattr(processor, 'tokenizer', processor) for processor in (self.processor, teacher))
        common = checks.common_vocabulary(student, teacher, args.model, args.teacher_model)
        if len(student) != len(teacher):
            logger.info(
                f'The tokenizers share their first {common} ids (student {len(student)}, teacher {len(teacher)}); only those are compared.'
            )
        return len(student), len(teacher)
