"""``megatron rlhf --rlhf_type gkd`` before the trainer: what can be wrong is found before any weights load."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from swift.megatron.pipelines.train.rlhf import MegatronRLHF
from transformers import AutoConfig

from .. import checks
from ..arguments import OptionError, teacher_offload
from ..memory.verdict import Card
from ..rewards import rewards_of
from ..step.remote import check_servers
from ..step.samples import with_used_columns
from ..teachers.average import average_of
from ..unused import Entry, say_unused
from .adapters import found_adapter
from .memory import foretell
from .options import (
    AVERAGE,
    SIZES,
    check_layout,
    check_model,
    check_overrides,
    check_precision,
    check_routing,
    check_teacher,
    loads_teacher,
    resumed_from,
    said_once,
)
from .trainer import GKDTrainer


def _only_engines_have_teacher(args: Any) -> bool:
    return args.teacher_model is not None and not loads_teacher(args)


# What has no effect with this back end.
NOT_USED: tuple[Entry, ...] = (
    ('data_sharding', lambda a: True, 'consecutive rows go to the ranks in turn, so that every layout trains on the same steps'),
    ('gkd_on_missing_engine', lambda a: a.use_vllm, 'vLLM answers for the student'),
    *(
        (name, _only_engines_have_teacher, 'no teacher is loaded into the training processes')
        for name in ('offload_teacher_model', 'gkd_teacher_offload', *(f'teacher_{size}' for size in SIZES))
    ),
    (
        'gkd_optimizer_offload',
        lambda a: a.gkd_optimizer_offload and (teacher_offload(a) is None or not loads_teacher(a)),
        'no teacher comes from the host; see --gkd_teacher_offload',
    ),
    (
        'gkd_teacher_batch_size',
        lambda a: a.context_parallel_size > 1,
        "with --context_parallel_size the teacher takes the student's micro-batches",
    ),
    ('num_train_epochs', lambda a: a.streaming, 'a stream begins again when it ends; --train_iters says how long the run is'),
    ('eval_iters', lambda a: a.eval_iters > 0, 'the whole evaluation set is evaluated; 0 switches evaluation off'),
)


class GKDPipeline(MegatronRLHF):
    """ms-swift's pipeline, with start-up checks in front of the models.

    Attributes:
        until_engines_answer: Under Ray, returns once the engines answer that are started beside the ranks.
    """

    until_engines_answer: Callable[[], Any] = staticmethod(lambda: None)

    def run(self) -> dict[str, Any]:
        with said_once():
            self.check_options()
            self._tokens = checks.tokenizer_lengths(self.args, self.processor)
            self._optimizer_leaves = foretell(self.args, Card.of_this_rank())
        self.until_engines_answer()
        return super().run()

    def prepare_trainer(self) -> GKDTrainer:
        return GKDTrainer(
            self.args,
            self.template,
            vllm_client=self._prepare_vllm_client(),
            tokenizer_lengths=self._tokens,
            teacher_is_start=self._adapter_is_start() or checks.teacher_is_start(self.args),
            rewards=self._rewards,
            optimizer_leaves=self._optimizer_leaves,
        )

    def _adapter_is_start(self) -> bool:
        """Whether the teacher is the student's base with the adapter that training starts from."""
        args = self.args
        same = len(args.teacher_adapters) == len(args.adapters) == 1 and checks.same_weights(args, args.teacher_model)
        return same and os.path.samefile(args.teacher_adapters[0], args.adapters[0])

    def _get_dataset(self):
        datasets = self.load_datasets()
        self.check_rows(*datasets)
        return datasets

    def load_datasets(self):
        return with_used_columns(self.args, super()._get_dataset)

    def check_rows(self, train_dataset, val_dataset) -> None:
        args = self.args
        with said_once():
            checks.check_datasets(args, train_dataset, val_dataset)
            # A generation batch may begin with the last steps of an epoch; a stream begins again in the middle of a step.
            data_parallel = args.global_batch_size // args.micro_batch_size // args.num_microbatches
            at_once = (
                (args.micro_batch_size * data_parallel, 'the rows of a micro-batch of all ranks (--micro_batch_size × ranks)')
                if args.streaming
                else (args.global_batch_size, 'the rows of a step (--global_batch_size)')
            )
            self._rewards = rewards_of(args, *at_once, train_dataset, val_dataset)
        if args.teacher_model_server is not None:
            self._check_servers(train_dataset, val_dataset)

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

    def check_options(self) -> None:
        args = self.args
        check_layout(args)  # once more: by now it is known whether the teacher is the student's base
        check_precision(args)
        check_overrides(args)
        student = AutoConfig.from_pretrained(args.model_dir, trust_remote_code=True)
        check_model('--model', args.model, student, args)
        args.teacher_adapters = [found_adapter(args, adapter) for adapter in args.teacher_adapters]
        teacher = None
        if loads_teacher(args):
            teacher = AutoConfig.from_pretrained(args.teacher_model_dir, trust_remote_code=True)
            check_teacher(args.teacher_model, teacher, args)
        check_routing(args, student, teacher)
        resumed = resumed_from(args)
        if args.gkd_self_teacher == 'ema' and resumed is not None:
            average_of(resumed[0], AVERAGE, resumed[1], '--finetune true')
        checks.check_teacher_engine(args)
        checks.check_topk(args)
        say_unused(args, NOT_USED)
