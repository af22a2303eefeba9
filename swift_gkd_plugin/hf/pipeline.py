"""``swift rlhf --rlhf_type gkd`` before the trainer: what can be wrong is found before any weights load."""

from __future__ import annotations

from typing import Any

from swift.pipelines.train.rlhf import SwiftRLHF
from swift.utils import get_logger

from .. import checks
from ..arguments import OptionError

logger = get_logger()


class GKDPipeline(SwiftRLHF):
    """ms-swift's pipeline, with start-up checks in front of the models."""

    def _prepare_model_tokenizer(self) -> None:
        self._datasets = self._loaded_datasets()
        self._check_datasets(*self._datasets)
        self._check_options()
        self._tokens = self._check_tokenizers()
        super()._prepare_model_tokenizer()

    def _loaded_datasets(self):
        try:
            return super()._get_dataset()
        except StopIteration:  # what ms-swift makes of a file without a row
            return None, None

    def _get_dataset(self):
        return self._datasets

    def _check_datasets(self, train_dataset, val_dataset) -> None:
        args = self.args
        if args.cached_dataset or args.cached_val_dataset:
            return
        needed = None if args.lmbda == 1 or args.seq_kd else f'--lmbda {args.lmbda} without --seq_kd trains on responses of the dataset'
        checks.check_rows(train_dataset if train_dataset is not None else [], '--dataset', needed)
        if val_dataset is not None:
            needed = '--gkd_eval_source dataset scores responses of the dataset' if args.gkd_eval_source == 'dataset' else None
            checks.check_rows(val_dataset, '--val_dataset', needed)

    def _check_options(self) -> None:
        args = self.args
        if args.multi_turn_scheduler and not args.use_vllm:
            raise OptionError(f'--multi_turn_scheduler {args.multi_turn_scheduler} needs an engine: add --use_vllm true with --vllm_mode.')
        if args.teacher_model_server is not None:
            raise OptionError(
                f'--teacher_model_server {args.teacher_model_server}: this version of the plugin has local teachers only; use '
                "--teacher_model, or SWIFT_GKD_PLUGIN=0 for ms-swift's own GKD."
            )
        for name, why in (
            ('use_liger_kernel', "its fused JSD is replaced by the plugin's; its other kernels are used"),
            ('packing', 'responses change with every step, so rows are not packed beforehand; it works as --padding_free'),
            ('group_by_length', 'the length of a response is not known before it is generated; rows come in random order'),
            ('cached_dataset', 'rows are encoded again, their cached lengths are not used'),
        ):
            if getattr(args, name, None):
                logger.warning(f'--{name} {getattr(args, name)}: {why}.')

    def _check_tokenizers(self) -> tuple[int, int] | None:
        """Lengths of the student's and the teacher's tokenizer; None if there is no other model."""
        args = self.args
        if args.teacher_model is None:
            return None
        _, student = args.get_model_processor(load_model=False)
        _, teacher = args.get_model_processor(
            model=args.teacher_model, model_type=args.teacher_model_type, revision=args.teacher_model_revision, load_model=False
        )
        student, teacher = (getattr(processor, 'tokenizer', processor) for processor in (student, teacher))
        common = checks.common_vocabulary(student, teacher, args.model, args.teacher_model)
        if len(student) != len(teacher):
            logger.info(
                f'The tokenizers share their first {common} ids (student {len(student)}, teacher {len(teacher)}); only those are compared.'
            )
        return len(student), len(teacher)

    def _get_trainer_kwargs(self) -> dict[str, Any]:
        return {**super()._get_trainer_kwargs(), 'tokenizer_lengths': self._tokens}
