"""What a run would check before its models load, what it would do, and what each of its ranks would hold."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .. import checks
from ..arguments import engine_scores, learns_from_rewards, teacher_offload
from ..divergence.implementations import foreseen
from ..memory.sizes import apart
from ..memory.table import Table, gib
from ..memory.verdict import Card, judged
from ..sources import Draw
from ..versions import untried
from .findings import ERROR, Findings
from .training import warnings_of

Check = tuple[str, Callable[[], None]]


class Run(ABC):
    """A run that does not begin, of one of the back ends.

    Args:
        args: ms-swift's, checked.
        ranks: How many there would be.

    Attributes:
        datasets: For training and for validation, once they were loaded; ms-swift's, or None.
        tokens: Lengths of the student's and the teacher's tokenizer, once they were compared.
    """

    def __init__(self, args: Any, ranks: int):
        self.args, self.ranks = args, ranks
        self.datasets: tuple[Any, Any] = (None, None)
        self.tokens: tuple[int, int] | None = None

    trainer: str  # its dotted name
    generator: str  # who answers for the student without vLLM

    @property
    @abstractmethod
    def checks(self) -> Iterator[Check]:
        """What the back end's pipeline checks, in its order, each with a name."""

    @property
    @abstractmethod
    def rows_of_update(self) -> int:
        """Responses that an update learns from."""

    @property
    @abstractmethod
    def counted(self) -> tuple[Callable[[Card | None], Any], Callable[[Any], Table], Callable[[Any], Mapping[str, Callable[[Any], Any]]]]:
        """What a run is made of on a card, the table of it, and what makes it smaller; see ``memory/verdict.py``."""

    @property
    @abstractmethod
    def epochs(self) -> tuple[float | None, int | None]:
        """How long the run is: in epochs, or in updates, which count if both are given."""

    @property
    @abstractmethod
    def shards(self) -> int:
        """Ranks that an output head is spread over."""

    @property
    @abstractmethod
    def layout(self) -> str:
        """How the ranks share the work, in words."""


class TransformersRun(Run):
    trainer, generator = 'swift_gkd_plugin.hf.trainer.GKDTrainer', 'transformers'

    def __init__(self, args: Any, ranks: int):
        super().__init__(args, ranks)
        from ..hf.pipeline import GKDPipeline

        self.pipeline = GKDPipeline.__new__(GKDPipeline)  # what its constructor does is to load
        self.pipeline.args = args

    @property
    def checks(self) -> Iterator[Check]:
        pipeline = self.pipeline
        yield 'options', pipeline.check_options
        yield 'dataset', pipeline.load_datasets
        self.datasets = getattr(pipeline, 'datasets', self.datasets)
        yield 'rewards', pipeline.check_rewards
        yield 'tokenizers', pipeline.compare_tokens
        self.tokens = getattr(pipeline, 'tokens', None)

    @property
    def rows_of_update(self) -> int:
        # Only there ms-swift puts its own number where none is given.
        return self.args.per_device_train_batch_size * self.ranks * self.args.training_args.gradient_accumulation_steps

    @property
    def counted(self):
        from ..hf import memory

        loading = self.pipeline.teacher_loading
        info = loading and loading.info
        args = self.args
        return (
            lambda card: memory.setup_of(args, self.pipeline.prepare_model, info, card),
            memory.table,
            lambda setup: memory.changes(setup, args),
        )

    @property
    def epochs(self) -> tuple[float | None, int | None]:
        return self.args.num_train_epochs, self.args.max_steps if self.args.max_steps > 0 else None

    @property
    def shards(self) -> int:
        return 1

    @property
    def layout(self) -> str:
        args = self.args
        if args.fsdp:
            return 'FSDP2'
        if args.deepspeed:
            return f'DeepSpeed, ZeRO stage {args.deepspeed.get("zero_optimization", {}).get("stage", 0)}'
        return 'DDP' if self.ranks > 1 else 'one process'


class MegatronRun(Run):
    trainer, generator = 'swift_gkd_plugin.megatron.trainer.GKDTrainer', 'megatron-core'

    def __init__(self, args: Any, ranks: int):
        super().__init__(args, ranks)
        from ..megatron.pipeline import GKDPipeline

        self.pipeline = GKDPipeline.__new__(GKDPipeline)
        self.pipeline.args = args
        self.pipeline.processor = args.get_model_processor(load_model=False)[1]

    @property
    def checks(self) -> Iterator[Check]:
        yield 'options', self.pipeline.check_options
        yield 'tokenizers', self._compare_tokens
        yield 'dataset', self._load
        yield 'rows', lambda: self.pipeline.check_rows(*self.datasets)

    def _compare_tokens(self) -> None:
        self.tokens = checks.tokenizer_lengths(self.args, self.pipeline.processor)

    def _load(self) -> None:
        self.datasets = self.pipeline.load_datasets()

    @property
    def rows_of_update(self) -> int:
        return self.args.global_batch_size

    @property
    def counted(self):
        from ..megatron import memory

        args = self.args
        return lambda card: memory.setup_of(args, card), memory.table, lambda setup: memory.changes(setup, args)

    @property
    def epochs(self) -> tuple[float | None, int | None]:
        return self.args.num_train_epochs, None if self.args.num_train_epochs else self.args.train_iters

    @property
    def shards(self) -> int:
        return self.args.tensor_model_parallel_size

    @property
    def layout(self) -> str:
        args = self.args
        sizes = {
            'TP': args.tensor_model_parallel_size,
            'PP': args.pipeline_model_parallel_size,
            'CP': args.context_parallel_size,
            'EP': args.expert_model_parallel_size,
            'DP': args.data_parallel_size,
        }
        return 'megatron-core, ' + ' x '.join(f'{name}{size}' for name, size in sizes.items() if size > 1 or name == 'DP')


def check(run: Run, found: Findings) -> bool:
    """What the pipeline checks, each after the other whatever the others say.

    Returns:
        Whether nothing is refused.
    """
    found.section, before = 'command', len(found)
    for name, call in run.checks:
        with found.refusals(name), warnings_of(found, 'unused' if name == 'options' else name, besides=tuple(untried())):
            call()
    return not any(finding.level == ERROR for finding in found[before:])


def describe(run: Run, found: Findings) -> None:
    """What the run would do."""
    args = run.args
    found.section = 'run'
    found.ok('trainer', f'{run.trainer} on {run.ranks} rank{"s" if run.ranks > 1 else ""}: {run.layout}; {_what_is_trained(args)}.')
    found.ok('sources', _sources(run))
    found.ok('teacher', _teacher(args))
    found.ok('loss', _loss(run))


def _what_is_trained(args: Any) -> str:
    return 'all parameters' if args.tuner_type == 'full' else f'an adapter ({args.tuner_type})'


def _sources(run: Run) -> str:
    args = run.args
    student = f"the student's ({f'vLLM, {args.vllm_mode}' if args.use_vllm else run.generator})"
    shares = {student: args.lmbda, "the teacher's" if args.seq_kd else "the dataset's": 1 - args.lmbda}
    answered = ', '.join(f'{share:.0%} {whose}' for whose, share in shares.items() if share > 0)
    generated = f', responses of at most {args.max_completion_length}' if args.lmbda > 0 or args.seq_kd else ''
    return f'Responses: {answered}; rows of at most {args.max_length} tokens{generated}.'


def _teacher(args: Any) -> str:
    if args.gkd_loss_weight == 0 and not args.seq_kd:
        return 'No teacher: --gkd_loss_weight 0.'
    if args.teacher_model_server is not None:
        return f'The teacher is behind {args.teacher_model_server}.'
    if args.teacher_model is not None:
        if engine_scores(args):
            return f'The teacher, {args.teacher_model}, is in a vLLM engine beside the ranks, and nowhere else.'
        also = ', and answers in a vLLM engine' if args.gkd_teacher_engine == 'vllm' else ''
        where = {'model': 'on the host, and visits the device once a step', 'layer': 'on the host, and comes layer by layer'}
        return f'The teacher, {args.teacher_model}, is a separate model {where.get(teacher_offload(args), "on the device")}{also}.'
    if args.gkd_self_teacher == 'ema':
        return f'The teacher is the moving average of the student (decay {args.gkd_ema_decay}).'
    if getattr(args, '_adapter_on_base', None):
        return f"The teacher shares the student's base and has the adapter {args._adapter_on_base} there."
    if args._teacher_use_disable_adapter:
        return "The teacher shares the student's base: the same weights, with the adapter off."
    return 'The teacher is the student itself, as it is at each step.'


def _loss(run: Run) -> str:
    args, terms = run.args, []
    if args.gkd_loss_weight > 0:
        kind = f'jsd, beta {args.beta}' if args.gkd_divergence == 'jsd' else args.gkd_divergence
        if args.gkd_signal == 'sampled':
            of = "the teacher's log-probability of the sampled token"
        elif args.gkd_logits_topk is not None:
            of = f"the teacher's {args.gkd_logits_topk} likeliest tokens, tail {args.gkd_tail}"
        else:
            of = 'the whole distribution'
        temperature = args.temperature if args.gkd_temperature is None else args.gkd_temperature
        terms.append(f'{args.gkd_loss_weight:g} x divergence ({kind}) of {of} at temperature {temperature:g}')
    if args.sft_alpha > 0:
        terms.append(f'{args.sft_alpha:g} x cross-entropy')
    if learns_from_rewards(args):
        terms.append(f'{args.gkd_rl_weight:g} x rewards ({", ".join(args.reward_funcs)})')
    return ' + '.join(terms) + '.'


def operator(run: Run, found: Findings, on_gpu: bool, columns: int) -> None:
    """Args: whether the ranks have GPUs, columns that are compared."""
    if run.args.gkd_loss_weight > 0:
        found.ok('operator', f'The divergence over {columns} tokens is computed by {foreseen(on_gpu, columns, run.shards)}.')


def plan(run: Run, found: Findings, card: Card | None) -> None:
    """The memory of the fullest rank."""
    found.section = 'memory'
    setup_of, table, changes = run.counted
    try:
        with apart():
            setup = setup_of(card)
            verdict = judged(setup, table, changes(setup), setup.card)
    except Exception as error:  # as in a run, which goes on without
        found.warning('memory', f'The models cannot be counted: {type(error).__name__}: {error}', 'Watch the memory of the first step.')
        return
    data = {
        'peak': verdict.table.peak(),
        'phases': {phase: verdict.table.held(phase) for phase in verdict.table.phases},
        'parts': [{'name': p.name, 'bytes': p.bytes, 'phases': list(p.phases), 'exact': p.exact} for p in verdict.table.parts],
        'card': setup.card and setup.card.bytes,
    }
    shown = {'more': str(verdict.table), 'data': data}
    for line, tell in ((verdict.too_much, found.error), (verdict.perhaps, found.warning)):
        if line is not None:
            what, _, do = line.rpartition('; ')
            tell('memory', f'{what}.', do[0].upper() + do[1:], **shown)
            return
    if setup.card is None:
        found.note('memory', verdict.peak, 'There is no card to compare it with; say its size with --gpu-memory GIB.', **shown)
    else:
        room = setup.card.bytes - verdict.table.peak()
        found.ok('memory', f'{verdict.peak} {gib(room)} are left for what is not counted.', **shown)


def length(run: Run, found: Findings, tokens: Mapping[str, float]) -> None:
    """How long the run is.

    Args:
        tokens: Of a sampled row, in the mean: of its ``prompt`` and of its ``response``, as far as they are known.
    """
    args, (train, _) = run.args, run.datasets
    epochs, updates = run.epochs
    rows = len(train) if train is not None and hasattr(train, '__len__') else None
    at_once = f'{run.rows_of_update} responses per update'
    if rows is None:
        found.ok('length', f'{at_once}; a stream, or a cached dataset, whose length is not known here; {updates or "?"} updates.')
        return
    responses = Draw.of(args).epoch_length(rows, epochs or 1)
    per_epoch = math.ceil(responses / run.rows_of_update)
    if updates is None:
        updates = math.ceil(per_epoch * (epochs or 1))
    generated = args.lmbda if not args.seq_kd else 1.0
    response = generated * args.max_completion_length + (1 - generated) * tokens.get('response', args.max_completion_length)
    total = round(responses * (tokens.get('prompt', args.max_length) + response))
    found.ok(
        'length',
        f'{rows} rows, {responses} responses, {at_once}: {per_epoch} updates and at most about {total:,} tokens per epoch; '
        f'{updates} updates in all.',
        data={'rows': rows, 'responses': responses, 'updates_per_epoch': per_epoch, 'updates': updates, 'tokens_per_epoch': total},
    )
