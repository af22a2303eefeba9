"""What a rank of the transformers back end will hold: DDP, ZeRO and FSDP2, told before any weights load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from swift.utils import is_mp
from torch import nn

from ..arguments import engine_scores, extrapolates, teacher_offload
from ..memory import estimates
from ..memory.estimates import BF16, FP32, Rows
from ..memory.setup import Engines, visiting
from ..memory.setup import Setup as AnySetup
from ..memory.sizes import ModelSize, Weight, empty_model, numbers
from ..memory.table import GENERATION, PHASES, STUDENT, TEACHER, UPDATE, Part, Table, but
from ..memory.verdict import Card
from ..memory.verdict import foretell as foretell_setup
from ..step.teaching import KEPT_BYTES, bytes_per_token
from .backend import FEW_TOKENS, MANY_TOKENS
from .reward_models import empty, named
from .zero3 import is_zero3

# How the ranks share what is trained.
WHOLE, DDP, ZERO1, ZERO2, ZERO3, FSDP2 = 'whole', 'ddp', 'zero1', 'zero2', 'zero3', 'fsdp2'
# Moments that an optimizer of transformers' (--optim) keeps of a parameter, in its dtype.
MOMENTS = {'adamw_torch': 2, 'adamw_torch_fused': 2, 'sgd': 0}
SUBGROUP = 10**9  # numbers that ZeRO-3 updates at a time (sub_group_size)


@dataclass(frozen=True)
class Setup(AnySetup):
    """
    Attributes:
        world: Ranks.
        sharding: One of the above.
        zero: DeepSpeed's ``zero_optimization``.
        moments: Of the optimizer; None if it is not known.
        mixed: Whether it trains in mixed precision, for which FSDP2 keeps what is trained in fp32.
        checkpointing: Whether layers are computed again for the backward pass.
        bits, teacher_bits: Of quantised weights; None for those that are not.
        adapter: Numbers of an adapter that is trained in place of what the student trains; None for what it trains.
        averaged: Whether a moving average of what is trained teaches.
        in_student: Whether a teacher that lives in the student's weights scores.
        each_micro_batch: Whether the teacher looks at each micro-batch right before the student.
        teacher_sharded, teacher_on_host: Whether DeepSpeed or FSDP2 spread its weights, and keep them on the host.
        teacher_rows: ``--gkd_teacher_batch_size``.
        offload: ``--gkd_teacher_offload``.
        placed: Whether ``--teacher_device_map`` places it.
        gathers: Whether ZeRO-3 brings the student together to generate.
        rewards, sure_rewards: Models that score, whole on each rank; whether they are what was counted.
        away: Of ``weights`` and ``optimizer``, what leaves while vLLM generates.
        sure: Whether weights are where this module thinks.
    """

    world: int
    sharding: str
    zero: dict[str, Any]
    moments: int | None
    mixed: bool
    checkpointing: bool
    bits: float | None
    teacher_bits: float | None
    adapter: int | None
    averaged: bool
    in_student: bool
    each_micro_batch: bool
    teacher_sharded: bool
    teacher_on_host: bool
    teacher_rows: int | None
    offload: str | None
    placed: bool
    gathers: bool
    rewards: tuple[ModelSize, ...]
    sure_rewards: bool
    away: tuple[str, ...]
    sure: bool

    @property
    def itemsize(self) -> int:
        return self.cast(self.student.inside.itemsize)

    def cast(self, itemsize: int) -> int:
        """Bytes of a number once DeepSpeed has a model, which it casts to 16 bits where it trains in mixed precision."""
        return min(itemsize, BF16) if self.zero and self.mixed else itemsize

    @property
    def n(self) -> int:
        """Ranks that share a thing."""
        return self.world if self.sharding in (ZERO1, ZERO2, ZERO3, FSDP2) else 1

    def on_host(self, what: str) -> bool:
        """Args: ``param`` or ``optimizer``, of DeepSpeed's options."""
        return (self.zero.get(f'offload_{what}') or {}).get('device') in ('cpu', 'nvme')

    def of_trained(self, sharded: bool) -> int:
        """Numbers of what is trained, on this rank."""
        if self.adapter is not None:
            return -(-self.adapter // self.n) if sharded else self.adapter
        trained = self.student.trained
        if not sharded or self.n == 1:
            return numbers(trained)
        if self.sharding in (ZERO1, ZERO2):  # of one flat tensor
            return -(-numbers(trained) // self.n)
        return sum(_of_shard(w, self.n, self.sharding) for w in trained)


def _of_shard(weight: Weight, n: int, sharding: str) -> int:
    """Numbers of the largest shard: equal pieces of a flat parameter, or rows of a matrix."""
    if sharding == ZERO3:
        return -(-weight.numbers // n)
    rows = weight.shape[0] if weight.shape else 1
    return -(-rows // n) * math.prod(weight.shape[1:])


def table(setup: Setup) -> Table:
    """What a rank holds."""
    phases = tuple(phase for phase in PHASES if phase in _phases(setup))
    parts = [*_of_student(setup), *_of_teacher(setup), *_of_rewards(setup), *_of_work(setup), *setup.engines.parts(setup.card)]
    return Table(tuple(part for part in parts if part.bytes), phases, tuple(_not_counted(setup)))


def _phases(setup: Setup) -> set[str]:
    found = {STUDENT, UPDATE, *setup.engines.phases}
    if setup.scores:
        found.add(TEACHER)
    if setup.rows.answers:
        found.add(GENERATION)
    return found


def _of_student(setup: Setup) -> Iterable[Part]:
    size, b, n, sharding = setup.student, setup.itemsize, setup.n, setup.sharding
    sure = setup.sure and setup.bits is None
    trained = setup.of_trained(sharded=True)
    if sharding == ZERO3:
        # Partitioned weights are not cast any more, and PEFT makes an adapter in fp32.
        widths = ((w, w.itemsize if 'lora_' in w.name or 'modules_to_save' in w.name else b) for w in size.weights)
        weights = 0 if setup.on_host('param') else sum(width * _of_shard(w, n, ZERO3) for w, width in widths)
    elif sharding == FSDP2:
        wide = FP32 if setup.mixed else 0
        weights = sum(_of_shard(w, n, FSDP2) * (max(w.itemsize, wide) if w.trained else w.itemsize) for w in size.weights)
    elif setup.bits is not None:
        weights = size.at_bits(setup.bits)
    else:
        weights = b * numbers(size.weights) if setup.zero else size.bytes
    if setup.adapter is not None:
        weights += FP32 * trained
    leaves = {GENERATION} if 'weights' in setup.away else set()
    yield Part('student weights', weights, but(leaves), sure)

    dtype = _trained_itemsize(setup)
    backward = {STUDENT, UPDATE} | ({TEACHER} if _gradients_wait(setup) else set())
    if setup.on_host('optimizer'):
        pass  # and with it the gradients
    elif sharding in (ZERO2, ZERO3):
        yield Part('gradients', b * trained, PHASES if sharding == ZERO3 else backward, setup.sure)
    else:
        sure = setup.sure and not setup.zero and not size.trains_towers
        yield Part('gradients', (b if setup.zero else dtype) * setup.of_trained(sharding == FSDP2), backward, sure)
    if sharding == DDP:
        yield Part("gradients in DDP's buckets", dtype * setup.of_trained(False), PHASES, setup.sure)
    if sharding == ZERO2 and not setup.on_host('optimizer'):
        bucket = min(_number(setup.zero, 'reduce_bucket_size', 5e8), setup.of_trained(False))
        yield Part("ZeRO's buckets", int(bucket) * b * (2 if setup.zero.get('overlap_comm') else 1), (STUDENT,), False)
    if setup.moments is not None and not setup.on_host('optimizer'):
        kept = FP32 * (1 + setup.moments) if setup.zero else dtype * setup.moments
        leaves = {GENERATION} if 'optimizer' in setup.away else set()
        yield Part('optimizer', kept * trained, but(leaves), setup.sure and (bool(setup.zero) or not size.trains_towers))
        if setup.zero:
            at_a_time = min(trained, SUBGROUP) if sharding == ZERO3 else trained
            yield Part('gradients in fp32', FP32 * at_a_time, (UPDATE,), False)
    if setup.averaged:
        share = setup.of_trained(sharding in (ZERO3, FSDP2))
        yield Part("the teacher's average", FP32 * share, PHASES, setup.sure)

    here = (STUDENT, TEACHER) if setup.in_student else (STUDENT,)
    whole = sharding == ZERO3 and setup.gathers and setup.rows.answers
    if setup.rows.answers and not whole and not (setup.rows.answers_of_teacher and setup.teacher):
        here = (*here, GENERATION)
    yield from _gathered(setup, size, sharding, 'student, gathered', here)
    if whole:
        yield Part('student, whole to generate', b * numbers(size.weights), (GENERATION,))


def _gathered(setup: Setup, size: ModelSize, sharding: str, name: str, phases: tuple[str, ...]) -> Iterable[Part]:
    """Weights that a forward brings together, a few layers at a time."""
    b, everything = size.inside.itemsize, numbers(size.weights)
    if sharding == ZERO3:
        limit = _number(setup.zero, 'stage3_max_live_parameters', 1e9)
        yield Part(name, b * int(min(max(limit, size.largest_layer), everything)), phases, False)
    elif sharding == FSDP2:
        yield Part(name, b * min(2 * size.largest_layer, everything), phases, False)


def _of_teacher(setup: Setup) -> Iterable[Part]:
    size = setup.teacher
    if size is None or setup.placed:
        return
    sharding = setup.sharding if setup.sharding == FSDP2 else ZERO3
    n = setup.world if setup.teacher_sharded else 1
    visits = (TEACHER, GENERATION) if setup.rows.answers_of_teacher else (TEACHER,)

    def held(weights: Iterable[Weight]) -> int:
        return sum(setup.cast(w.itemsize) * (_of_shard(w, n, sharding) if n > 1 else w.numbers) for w in weights)

    def come(bytes: int) -> Iterable[Part]:
        whole = setup.itemsize * numbers(setup.student.weights) if setup.sharding == ZERO3 and setup.gathers else 0
        return visiting(bytes, max(setup.engines.asleep(setup.card), whole), setup.rows.answers_of_teacher, setup.sure)

    if setup.offload == 'model':
        yield Part('teacher weights, the head', held(w for w in size.weights if w.name == size.head), PHASES, setup.sure)
        yield from come(held(w for w in size.weights if w.name != size.head))
    elif setup.offload == 'layer':
        yield Part('teacher weights, no layer', held(w for w in size.weights if w.name not in size.streamed), PHASES, setup.sure)
        yield from come(2 * size.buffer)
    elif setup.teacher_bits is not None:
        yield Part('teacher weights', size.at_bits(setup.teacher_bits), PHASES, False)
    elif not setup.teacher_on_host:
        yield Part('teacher weights', held(size.weights), PHASES, setup.sure)
    if setup.sharding == FSDP2 and setup.world > 1:
        # accelerate 1.15 gathers the last norm and the head and leaves it to a backward pass to let go of them; a teacher has none.
        tail = (w for w in size.weights if w.name == size.head or w.name == size.last_norm)
        yield Part("teacher weights, FSDP2's whole head", sum(w.bytes for w in tail), PHASES, setup.sure)
    if setup.teacher_sharded:
        yield from _gathered(setup, size, sharding, 'teacher, gathered', visits)


def _of_rewards(setup: Setup) -> Iterable[Part]:
    """Models that score each cycle's responses, as many rows together as a micro-batch has, when these have been generated."""
    yield Part('reward model weights', sum(size.bytes for size in setup.rewards), PHASES, setup.sure and setup.sure_rewards)
    forwards = [estimates.forward_bytes(size.inside, setup.rows.tokens) for size in setup.rewards]
    yield Part("the reward model's forward", max(forwards, default=0), (GENERATION,), False)


def _of_work(setup: Setup) -> Iterable[Part]:
    size, rows, work = setup.student, setup.rows, estimates
    inside, teacher = size.inside, setup.teacher or size
    if setup.scores:
        if setup.teacher is not None:
            floor = MANY_TOKENS if setup.teacher_sharded or setup.offload else FEW_TOKENS
            tokens = (setup.teacher_rows or 0) * rows.length or max(2 * rows.tokens, floor)
            tokens = min(tokens, rows.micro_batches * rows.tokens)
        else:
            tokens = rows.tokens
        if setup.in_student or setup.teacher is not None:
            yield Part("the teacher's forward", work.forward_bytes(teacher.inside, tokens), (TEACHER,), False)
        payload = work.payload_bytes(teacher.inside.hidden, _payload_tokens(setup), setup.topk, teacher.inside.itemsize)
        yield Part('what the teacher leaves', payload, (TEACHER, STUDENT), False)
    if setup.extrapolates:  # its forward takes less than the student's, which comes next
        beside = work.payload_bytes(inside.hidden, rows.trained_tokens, itemsize=inside.itemsize)
        yield Part('what the reference leaves', beside, (STUDENT,), False)
    layers = inside.layers
    kept, whole = (layers, 1) if setup.checkpointing else (0, layers)
    title = f'activations, {rows.rows} x {rows.length} tokens'
    yield Part(title, work.activation_bytes(inside, rows.tokens, kept, whole), (STUDENT,), False)
    device = 'cpu' if setup.card is None else 'cuda'
    head_trained = size.head_is_trained and setup.adapter is None
    operator = work.operator_bytes(inside.hidden, inside.vocab, rows.trained_tokens, device=device, trained=head_trained)
    yield Part('divergence: a chunk of logits', operator, (STUDENT,), False)
    if rows.answers:
        answering = teacher if rows.answers_of_teacher else size
        cache = work.cache_bytes(answering.cache, rows.answers, rows.length, rows.budget)
        yield Part('keys and values', cache, (GENERATION,), False)


def _not_counted(setup: Setup) -> Iterable[str]:
    yield 'CUDA context, NCCL, unused blocks of the allocator'
    if setup.moments is None:
        yield 'the optimizer, which is unknown'
    if setup.placed:
        yield 'the teacher, which --teacher_device_map places'
    yield from setup.engines.not_counted(setup.card)
    if setup.zero and setup.sharding == WHOLE:
        yield "fp32 weights and gradients of DeepSpeed's stage 0"


def _payload_tokens(setup: Setup) -> int:
    """Trained tokens whose signals are there at a time."""
    rows = setup.rows
    if setup.each_micro_batch:
        return rows.trained_tokens
    step = rows.micro_batches * rows.trained_tokens
    if setup.offload == 'model' or setup.teacher is None:
        return step
    return min(step, max(KEPT_BYTES // _signal_bytes(setup), rows.trained_tokens))


def _signal_bytes(setup: Setup) -> int:
    return bytes_per_token(setup.topk, setup.teacher.inside.hidden)


def _gradients_wait(setup: Setup) -> bool:
    """Whether the teacher looks at micro-batches after the first backward pass of a step."""
    if setup.each_micro_batch:
        return True
    step = setup.rows.micro_batches * setup.rows.trained_tokens
    return setup.teacher is not None and setup.offload != 'model' and step * _signal_bytes(setup) > KEPT_BYTES


def _trained_itemsize(setup: Setup) -> int:
    trained = setup.student.trained
    if setup.adapter is not None or (setup.sharding == FSDP2 and setup.mixed):
        return FP32
    return max((w.itemsize for w in trained), default=0)


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    return default if isinstance(value, str) else value  # "auto"


# --- from the options ---


def foretell(args: Any, prepare: Callable[[Any, nn.Module], nn.Module], teacher_info: Any | None, card: Card | None) -> None:
    """Args:
    args: ms-swift's arguments.
    prepare: Puts the adapters on a student, or freezes what is not trained.
    teacher_info: What ms-swift knows of a separate teacher.
    card: Of this rank.
    """
    foretell_setup(lambda: setup_of(args, prepare, teacher_info, card), table, lambda setup: changes(setup, args))


def setup_of(args: Any, prepare: Callable[[Any, nn.Module], nn.Module], teacher_info: Any | None, card: Card | None) -> Setup:
    student = ModelSize.of(prepare(args, empty_model(args)))
    separate = args.teacher_model is not None and not engine_scores(args)
    teacher = None
    if separate:
        which = {'model': args.teacher_model, 'model_type': args.teacher_model_type, 'revision': args.teacher_model_revision}
        teacher = ModelSize.of(empty_model(args, **which).requires_grad_(False))
    world, config = args.global_world_size, args.deepspeed or {}
    zero = config.get('zero_optimization') or {}
    sharding = FSDP2 if args.fsdp else DDP if world > 1 else WHOLE
    if config:
        sharding = {1: ZERO1, 2: ZERO2, 3: ZERO3}.get(zero.get('stage', 0), WHOLE)
    of_teacher = (args.teacher_deepspeed or config) if separate else {}
    spread = is_zero3(of_teacher) or bool(args.fsdp)
    judges = [empty(args, one) for one in named(args)]
    training = args.training_args
    optim = getattr(training.optim, 'value', training.optim)
    # DeepSpeed can have an optimizer of its own, or keep its state in bf16.
    narrow = any(name.startswith('bf16_') for name in config.get('bf16') or {})
    known = args.optimizer in (None, 'default') and not args.use_galore and 'optimizer' not in config and not narrow
    local = args.teacher_model_server is None and not engine_scores(args)
    fsdp = args.fsdp_config if args.fsdp and isinstance(args.fsdp_config, dict) else {}
    colocated = args.use_vllm and args.vllm_mode == 'colocate'
    by_map = args.device_map is not None or is_mp()  # a process alone with several cards: ms-swift spreads models over them
    placed = args.teacher_device_map is not None
    return Setup(
        student=student,
        teacher=teacher,
        rows=Rows.of(args, args.per_device_train_batch_size, training.gradient_accumulation_steps),
        world=world,
        sharding=sharding,
        zero=zero,
        moments=MOMENTS.get(optim) if known else None,
        mixed=bool(training.bf16 or training.fp16),
        checkpointing=bool(args.gradient_checkpointing or fsdp.get('activation_checkpointing')),
        bits=_bits(args.model_info, args.quant_method, args.quant_bits),
        teacher_bits=_teacher_bits(args, teacher_info) if separate else None,
        adapter=None,
        averaged=args.gkd_self_teacher == 'ema',
        in_student=local and not separate and args.gkd_loss_weight > 0,
        scores=args.gkd_loss_weight > 0 and args.teacher_model_server is None,
        each_micro_batch=(local and not separate) or args.gkd_routing == 'teacher',
        teacher_sharded=spread,
        teacher_on_host=_on_host(of_teacher),
        offload=teacher_offload(args) if separate else None,
        placed=placed,
        teacher_rows=args.gkd_teacher_batch_size,
        topk=args.gkd_logits_topk,
        extrapolates=extrapolates(args),
        gathers=args.ds3_gather_for_generation and args.lmbda > 0 and not args.use_vllm,
        engines=Engines.of(args),
        rewards=tuple(ModelSize.of(judge) for judge, _ in judges),
        sure_rewards=all(sure for _, sure in judges),
        away=('weights',) * bool(colocated and args.offload_model) + ('optimizer',) * bool(colocated and args.offload_optimizer),
        card=None if by_map else card,
        # LISA trains other layers at other times.
        sure=not (config.get('tensor_parallel') or args.tuner_backend == 'unsloth' or 'offload' in args.fsdp or args.lisa_activated_layers),
    )


def _bits(info: Any, method: str | None, bits: Any) -> float | None:
    """Of a model that is quantised already, or while it loads."""
    method, bits = (info.quant_method, info.quant_bits) if info.quant_method else (method, bits)
    return None if method in (None, 'none') else float(bits) if isinstance(bits, int) and bits else 8.0


def _teacher_bits(args: Any, info: Any) -> float | None:
    if args.teacher_quant_method is None:
        return _bits(info, args.quant_method, args.quant_bits)
    return _bits(info, args.teacher_quant_method, args.teacher_quant_bits)


def _on_host(config: dict[str, Any]) -> bool:
    zero = config.get('zero_optimization') or {}
    return is_zero3(config) and (zero.get('offload_param') or {}).get('device') in ('cpu', 'nvme')


def changes(setup: Setup, args: Any) -> dict[str, Callable[[Setup], Setup]]:
    """Options that make a run smaller, without taking anything from what is learnt, and then the others."""
    found: dict[str, Callable[[Setup], Setup]] = {}
    plain = setup.sharding in (WHOLE, DDP)
    if setup.engines.student is not None and not setup.engines.sleeps:
        found['--sleep_level 1'] = lambda s: replace(s, engines=replace(s.engines, sleeps=True))
    if not setup.checkpointing:
        found['--gradient_checkpointing true'] = lambda s: replace(s, checkpointing=True)
    if setup.rows.rows > 1:
        more = setup.rows.micro_batches * setup.rows.rows
        found[f'--per_device_train_batch_size 1 --gradient_accumulation_steps {more}'] = lambda s: replace(
            s, rows=replace(s.rows, rows=1, micro_batches=more)
        )
    quantised = setup.bits is not None or setup.teacher_bits is not None
    if setup.world > 1 and not args.fsdp and setup.sharding != ZERO3 and not quantised:
        found['--deepspeed zero3'] = lambda s: replace(
            s, sharding=ZERO3, zero={'stage': 3}, teacher_sharded=s.teacher is not None, offload=None if s.offload == 'layer' else s.offload
        )
    if setup.gathers and setup.sharding == ZERO3 and setup.rows.answers:
        found['--ds3_gather_for_generation false'] = lambda s: replace(s, gathers=False)
    if setup.teacher is not None and not args.fsdp and not quantised and not setup.placed:
        if setup.offload is None:
            found['--gkd_teacher_offload model'] = lambda s: replace(s, offload='model')
        if plain and setup.offload != 'layer' and not setup.rows.answers_of_teacher:
            found['--gkd_teacher_offload layer'] = lambda s: replace(s, offload=s.offload if s.zero else 'layer')
        if setup.offload is None and not setup.teacher_sharded:
            found['--teacher_quant_method bnb --teacher_quant_bits 4'] = lambda s: (
                s if s.teacher_sharded or s.offload else replace(s, teacher_bits=4.0)
            )
    if args.tuner_type == 'full':
        found['--tuner_type lora'] = lambda s: replace(s, adapter=s.student.low_rank(args.lora_rank))
    return found
