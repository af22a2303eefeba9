"""One pass over chunks of tokens: the engine under all operators.

for each chunk of tokens      logits of both sides (matrix products, fp32)
    for each block of rows    normalise, divergence, statistics, gradient, in place of the student's logits or narrowed
    gradient of the chunk     to the hidden states, and to the head where it is trained
"""

import functools
import importlib.util
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from . import memory
from .heads import LOWEST_LOGIT, HeadGradients, LinearHead, ReadyGradients, ReadyLogits
from .kinds import Divergence, Scratch, columns
from .sharding import Reduce, on_all_ranks
from .stats import TokenStats
from .topk import TopKTeacher, bucket_divergence, nearest_tail

_HAS_TRITON = importlib.util.find_spec('triton') is not None
# Two buffers of a chunk's logits take about this much. Larger chunks do not make the matrix products faster.
_CHUNK_BYTES = {'cpu': 320 << 20, 'cuda': 640 << 20}
# Rows are worked on a few at a time, so that on a CPU the elementwise buffers stay in the last-level cache.
_BLOCK_ELEMENTS = {'cpu': 1 << 19, 'cuda': 1 << 25}
# From this vocabulary on torch.compile makes the CPU's elementwise work; below, compiling takes longer than it saves. A
# model, not a batch, decides, so that a run's numbers do not depend on how it is split.
_COMPILED_VOCABULARY = 1 << 15


@dataclass
class Call:
    """One call of an operator, checked. Columns are those of this rank, from the id `first_id` on."""

    divergence: Divergence
    student: LinearHead | ReadyLogits
    teacher: list  # [(first column, head)] of a teacher with logits, else empty
    difference: bool  # `teacher` gives the teacher's logits minus the student's
    topk: TopKTeacher | None
    token_weights: Tensor  # [tokens]
    labels: Tensor | None  # [tokens], -100 for none
    label_weights: Tensor | None  # [tokens], None where the cross-entropy is not part of the loss
    vocab_size: int
    chunk: int | None  # tokens, or None to choose
    reduce: Reduce
    first_id: int
    widest: int  # columns of the rank that has most
    stats: TokenStats | None

    @property
    def tokens(self) -> int:
        return len(self.student.hidden)

    @property
    def has_teacher(self) -> bool:
        return bool(self.teacher) or self.topk is not None


def chunk_tokens(columns: int, itemsize: int, device: str, buffers: bool = False) -> int:
    """How many tokens' logits exist at a time, from the shape and the device: a multiple of 64, and at least 64. Every chunk
    has its reductions over a group, so there `columns` are those of the widest rank, for all to choose alike. buffers:
    whether elementwise buffers as large as the chunk come with them."""
    budget = _CHUNK_BYTES['cpu' if device == 'cpu' else 'cuda'] // (4 if buffers else 1)
    return max(64, budget // (2 * itemsize * columns) // 64 * 64)


def run(call: Call, gradients: HeadGradients | ReadyGradients | None) -> Tensor:
    """The loss of each token [tokens]; the gradient of their sum goes to `gradients`."""
    student = call.student
    device, dtype, width = student.hidden.device, student.dtype, student.columns
    kind = 'cpu' if device.type == 'cpu' else 'cuda'
    loss = torch.zeros(call.tokens, dtype=dtype, device=device)
    kernels = kernels_for(call)
    buffers = call.reduce.group is not None and kernels is None
    chunk = min(call.chunk or chunk_tokens(call.widest, dtype.itemsize, device.type, buffers), max(call.tokens, 1))
    elementwise = _block if kernels is None else partial(_kernel_block, kernels)
    # The kernels need no buffers, and the reductions over a group are per chunk: in both cases a block is a whole
    # chunk.
    block = chunk if kernels is not None or call.reduce.group is not None else max(1, min(chunk, _BLOCK_ELEMENTS[kind] // max(width, 1)))
    scratch = _Buffers(block, width, dtype, device)
    student_logits = memory.Rows(chunk, width, dtype, device)
    teacher_logits = memory.Rows(chunk, width, dtype, device) if call.teacher else None
    record = _Record(call, loss)
    for start in range(0, call.tokens, chunk):
        rows = slice(start, min(start + chunk, call.tokens))
        n = rows.stop - rows.start
        zs = student_logits[0:n]
        student.logits(rows, zs)
        zt = None
        if call.teacher:
            zt = teacher_logits[0:n]
            for first, head in call.teacher:
                head.logits(rows, zt if head.columns == width else zt[:, first : first + head.columns])
        into = None if gradients is None else zs if kernels is None else gradients.place(rows, zs)
        for top in range(0, n, block):
            inner = slice(top, min(top + block, n))
            outer = slice(start + inner.start, start + inner.stop)
            part = scratch.rows(inner.stop - inner.start)
            zs_part, zt_part = (None if z is None else z[inner] for z in (zs, zt))
            into_part = zs_part if into is zs else None if into is None else into[inner]
            loss[outer] = elementwise(call, outer, zs_part, zt_part, part, record, into_part)
        if gradients is not None:
            gradients.add(rows, into)
    return loss


class _Buffers:
    """Elementwise buffers [block, width]: probabilities of both sides, and the four of `kinds.Scratch`; more when asked
    for."""

    def __init__(self, block: int, width: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device, self.memory = (block, width), dtype, device, {}
        self.n = block

    def rows(self, n: int) -> '_Buffers':
        self.n = n
        return self

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.memory:
            self.memory[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.memory[name][: self.n]

    def scratch(self) -> Scratch:
        return Scratch(self['e'], self['y'], self['h'], self['b'])


class _Record:
    """Per-token statistics of a call on their way into its TokenStats."""

    def __init__(self, call: Call, like: Tensor):
        self.stats, self.like = call.stats, like
        if self.stats is not None:
            self.stats.clear()

    def __call__(self, rows: slice, **values: Tensor) -> None:
        if self.stats is None:
            return
        for name, value in values.items():
            if getattr(self.stats, name) is None:
                setattr(self.stats, name, torch.zeros(self.like.shape, dtype=torch.float32, device=self.like.device))
            getattr(self.stats, name)[rows] = value.to(torch.float32)


def _normalise(sides: list[tuple[Tensor, Tensor]], reduce: Reduce) -> list[tuple[Tensor, Tensor]]:
    """For each (logits, out): fill out with softmax(logits), return (largest logit, log-sum-exp), each [rows, 1] in
    fp64.

    The log-sum-exp is read off the largest probability, so that one fused softmax is all the work. Sharded: one MAX and
    one SUM for all sides together.
    """
    largest = [z.amax(-1, keepdim=True) for z, _ in sides]
    if reduce.group is None:
        for z, out in sides:
            torch.softmax(z, -1, out=out)
        return [(m.double(), m.double() - out.amax(-1, keepdim=True).double().log()) for m, (_, out) in zip(largest, sides, strict=False)]
    largest = reduce.max(torch.stack(largest))
    sums = reduce.sum(
        torch.stack(
            [
                torch.sub(z, m, out=out).exp_().sum(-1, keepdim=True, dtype=torch.float64)
                for m, (z, out) in zip(largest, sides, strict=False)
            ]
        )
    )
    for total, (_, out) in zip(sums, sides, strict=False):
        out.mul_(1 / total)
    return [(m.double(), m.double() + total.log()) for m, total in zip(largest, sums, strict=False)]


def _block(call: Call, rows: slice, zs: Tensor, zt: Tensor | None, buffers: _Buffers, record: _Record, into: Tensor | None) -> Tensor:
    """The loss of a block of rows. The gradient of their sum with respect to the head's products goes to `into`, which is
    zs, or is not made at None.

    zs, zt: [rows, columns] logits divided by the temperature, or zt those minus the student's; both are overwritten.
    """
    temperature, slope, want_gradient = call.student.temperature, call.student.slope, into is not None
    student, log_ratio = buffers['student'], zt
    if call.difference:
        zt = torch.add(zs, zt, out=buffers['teacher logits'])
    sides = [(zs, student)] + ([] if zt is None else [(zt, buffers['teacher'])])
    listed = None if call.topk is None else _Listed.of(call, rows)
    # The student's tail has a normaliser of its own: its share of the whole may be too small for a number.
    tail = [] if listed is None or call.topk.tail != 'bucket' else [(listed.without(zs, buffers['e']), buffers['h'])]
    norms = _normalise(sides + tail, call.reduce)
    label = None if call.labels is None else _Label.of(call, rows)
    if call.stats is not None and call.stats.detail:
        _detail(call, rows, sides, norms, label, buffers, record)

    loss = torch.zeros(len(zs), dtype=zs.dtype, device=zs.device)
    gradient = label_gradient = None
    if label is not None:
        cross_entropy, label_probs, scale = _cross_entropy(call, label, zs, student, norms[0], buffers)
        record(rows, cross_entropy=cross_entropy)
        if call.label_weights is not None:
            weights = call.label_weights[rows].to(zs.dtype) * label.counts
            loss += weights * cross_entropy
            label_gradient = weights * slope
    if call.has_teacher:
        if zt is None:
            value, gradient, factor = _topk_value_and_gradient(call, rows, zs, listed, norms, label, buffers, record, want_gradient)
        else:
            if not call.difference:
                log_ratio.sub_(zs)
            value, gradient, factor = _value_and_gradient(call, rows, log_ratio, student, norms, buffers, record, want_gradient)
        record(rows, divergence=value)
        weights = call.token_weights[rows].to(zs.dtype)
        loss += weights * value
    if not want_gradient:
        return loss
    if call.student.softcap:  # d tanh = 1 - tanh², and the logits are softcap·tanh / temperature
        damping = zs.mul_(temperature / call.student.softcap).square_().neg_().add_(1)
        into = buffers['damped']
    else:
        damping = None
    if gradient is None:
        into.zero_()
    else:
        torch.mul(gradient, (weights * (factor * slope / temperature))[:, None], out=into)
    if label_gradient is not None:
        into.add_(label_probs.mul_((label_gradient * scale)[:, None]))
        into.scatter_add_(1, label.column, -(label_gradient * label.here)[:, None])
    if damping is not None:
        damping.mul_(into)
    return loss


def _value_and_gradient(
    call: Call,
    rows: slice,
    log_ratio: Tensor,
    student: Tensor,
    norms,
    buffers: _Buffers,
    record: _Record,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None, float]:
    """D [rows] against a teacher with logits; its gradient with respect to the student's logits, but for a factor; the
    factor. log_ratio: the teacher's logits minus the student's."""
    log_ratio.sub_((norms[1][1] - norms[0][1]).to(log_ratio.dtype))
    kl_sums = call.stats is not None and call.stats.detail
    found, kls = columns(call.divergence, student, buffers['teacher'], log_ratio, buffers.scratch(), kl_sums)
    sums = call.reduce.sum(torch.stack([found.value, found.centre, *(kls or ())]))
    if kls:
        record(rows, forward_kl=sums[-2], reverse_kl=sums[-1])
    if not want_gradient:
        return sums[0], None, 0.0
    return sums[0], found.gradient(student, sums[1]), found.factor


def _topk_value_and_gradient(
    call: Call,
    rows: slice,
    zs: Tensor,
    listed: '_Listed',
    norms,
    label: '_Label | None',
    buffers: _Buffers,
    record: _Record,
    want_gradient: bool,
) -> tuple[Tensor, Tensor | None, float]:
    """The same against a top-k teacher; `topk.py` has the mathematics. buffers['h']: the distribution within the student's
    tail, if that is a bucket."""
    teacher, ids, present = listed.logprobs, listed.ids, listed.present
    column, here = listed.column, listed.here
    logprobs = zs.gather(1, column) - norms[0][1]  # the buckets are few, so their arithmetic is in fp64
    logprobs = call.reduce.sum(logprobs.masked_fill_(~here, 0))
    student = logprobs.masked_fill(~present, LOWEST_LOGIT)
    sharpening = call.topk.temperature / call.divergence.temperature
    with_tail = call.topk.tail == 'bucket'
    if with_tail:
        student = torch.cat([student, norms[1][1] - norms[0][1]], 1)
        teacher = torch.cat([teacher, nearest_tail(student, teacher, *call.topk.tail_range(rows, teacher, present), sharpening)], 1)
    detail = call.stats is not None and call.stats.detail
    found = bucket_divergence(call.divergence, student, teacher, sharpening, detail)
    if detail:
        record(
            rows,
            forward_kl=found.kls[0],
            reverse_kl=found.kls[1],
            teacher_entropy=found.teacher_entropy,
            student_mass_on_topk=logprobs.exp().mul_(present).sum(-1),
            top1_agreement=_top1(call, zs, norms[0][0]) == ids.gather(1, teacher[:, : ids.shape[1]].argmax(-1, keepdim=True))[:, 0],
        )
        if label is not None:
            hit = present & (ids == call.labels[rows][:, None])
            record(rows, teacher_prob_of_label=(teacher[:, : ids.shape[1]].exp() * hit).sum(-1))
    if not want_gradient:
        return found.value.to(zs.dtype), None, 0.0
    per_id = found.gradient[:, : ids.shape[1]].masked_fill(~here, 0)
    if with_tail:
        # Where all columns are listed (or masked) the student has no tail, and no columns to give its gradient to.
        per_tail = found.gradient[:, -1:].masked_fill(student[:, -1:] < LOWEST_LOGIT / 2, 0)
        gradient = buffers['h'].mul_(per_tail.to(zs.dtype))
    else:
        gradient = buffers['h'].zero_()
    return found.value.to(zs.dtype), gradient.scatter_add_(1, column, per_id.to(zs.dtype)), 1.0


@dataclass
class _Listed:
    """A block's top-k entries, as `TopKTeacher.entries` gives them.

    column: [rows, k], of this rank, 0 where the entry is elsewhere or does not count. here: [rows, k], whether it is here.
    """

    logprobs: Tensor
    ids: Tensor
    present: Tensor
    column: Tensor
    here: Tensor

    @classmethod
    def of(cls, call: Call, rows: slice) -> '_Listed':
        logprobs, ids, present = call.topk.entries(rows, call.vocab_size)
        column = ids - call.first_id
        here = present & (column >= 0) & (column < call.student.columns)
        return cls(logprobs, ids, present, column.masked_fill(~here, 0), here)

    def without(self, zs: Tensor, out: Tensor) -> Tensor:
        """The logits of what is not listed; LOWEST_LOGIT in the columns that are."""
        lowest = zs.new_full(self.here.shape, torch.inf).masked_fill_(self.here, LOWEST_LOGIT)
        return out.copy_(zs).scatter_reduce_(1, self.column, lowest, 'amin')


@dataclass
class _Label:
    """A block's labels.

    column: [rows, 1], of this rank, 0 where the label is elsewhere. here, counts: [rows], 0 or 1 as numbers.
    """

    column: Tensor
    here: Tensor
    counts: Tensor

    @classmethod
    def of(cls, call: Call, rows: slice) -> '_Label':
        label = call.labels[rows]
        column = label - call.first_id
        here = (column >= 0) & (column < call.student.columns)
        counts = (label >= 0) & (label < call.vocab_size)
        dtype = call.student.dtype
        return cls(column.masked_fill(~here, 0)[:, None], here.to(dtype), counts.to(dtype))

    def pick(self, reduce: Reduce, *terms: Tensor) -> Tensor:
        """The sum of the terms at the label, [rows]."""
        return reduce.sum(sum(x.gather(1, self.column)[:, 0] for x in terms) * self.here)


def _kernel_block(
    kernels: ModuleType, call: Call, rows: slice, zs: Tensor, zt: Tensor, buffers: '_Buffers', record: _Record, into: Tensor | None
) -> Tensor:
    """`_block` by the kernels of `_triton.py` or `_compiled.py`, for a teacher with logits; `into` may be other memory than
    zs, in half precision."""
    student, reduce, divergence = call.student, call.reduce, call.divergence
    temperature, detail = student.temperature, call.stats is not None and call.stats.detail
    label = None if call.labels is None else _Label.of(call, rows)
    found = kernels.normalise(zs, zt, call.difference, temperature, label is not None, detail)
    tops = torch.stack([side[0] for side in found])
    largest = reduce.max(tops.clone())
    below = tops - largest
    totals = torch.stack([found[0][1] * below[0].exp(), found[1][1] * below[1].exp(), found[0][2] * (below[0] * temperature).exp()])
    totals = reduce.sum(totals.double()).log()
    norm_s, norm_t = largest.double() + totals[:2]
    shift = (norm_t - norm_s).float()
    loss = torch.zeros(len(zs), dtype=zs.dtype, device=zs.device)
    label_norm = label_gradient = None
    if label is not None:
        label_norm = largest[0].double() * temperature + totals[2]
        cross_entropy = (label_norm.float() - label.pick(reduce, zs) * temperature) * label.counts
        record(rows, cross_entropy=cross_entropy)
        if call.label_weights is not None:
            weights = call.label_weights[rows].to(zs.dtype) * label.counts
            loss += weights * cross_entropy
            label_gradient = weights * student.slope
    norms = norm_s.float(), norm_t.float()
    sums = reduce.sum(kernels.sums(divergence, zs, zt, call.difference, *norms, shift, detail))
    record(rows, divergence=sums[0])
    if detail:
        best = [
            reduce.min((side[3] + call.first_id).masked_fill(side[0] < top, torch.iinfo(torch.long).max))
            for side, top in zip(found, largest, strict=True)
        ]
        record(
            rows,
            forward_kl=sums[2],
            reverse_kl=sums[3],
            student_entropy=sums[4],
            teacher_entropy=sums[5],
            top1_agreement=best[0] == best[1],
        )
        if label is not None:
            picked = label.pick(reduce, *((zs, zt) if call.difference else (zt,)))
            record(rows, teacher_prob_of_label=(picked - norms[1]).exp() * label.counts)
    weights = call.token_weights[rows].to(zs.dtype)
    loss += weights * sums[0]
    if into is not None:
        trained = label_gradient is not None
        kernels.gradient(
            divergence,
            zs,
            zt,
            call.difference,
            *norms,
            shift,
            sums[1].float(),
            weights * (student.slope / temperature),
            (label_norm.float(), label_gradient, label.column[:, 0].masked_fill(label.here == 0, -1)) if trained else None,
            temperature,
            student.softcap,
            into,
        )
    return loss


def kernels_for(call: Call) -> ModuleType | None:
    """The module whose kernels do this call's elementwise work; None: `_block` does it."""
    if not call.teacher or call.student.dtype != torch.float32:
        return None
    if call.student.hidden.is_cuda:
        return _triton_kernels(call.student.hidden.device, call.reduce.group)
    # Not over a group: its ranks must agree, and only some of them might have a compiler.
    if call.student.hidden.device.type == 'cpu' and call.vocab_size >= _COMPILED_VOCABULARY and call.reduce.group is None:
        from . import _compiled

        return _compiled if _compiled.works() else None
    return None


@functools.cache
def _triton_kernels(device: torch.device, group) -> ModuleType | None:
    """`_triton`, where its kernels run: on every rank of the group, for the ranks must make the same reductions."""
    works = False
    if _HAS_TRITON:
        from . import _triton

        works = _triton.works(device)
    return _triton if on_all_ranks(group, works, device) else None


def _cross_entropy(call: Call, label: _Label, zs: Tensor, student: Tensor, norm, buffers: _Buffers):
    """At temperature 1: -log S(label) [rows], the distribution [rows, columns] but for a factor, and the factor."""
    largest, log_norm = norm
    temperature = call.student.temperature
    picked = label.pick(call.reduce, zs)
    if temperature == 1:
        return (log_norm[:, 0].to(zs.dtype) - picked) * label.counts, student, 1.0
    probs = torch.sub(zs, largest.to(zs.dtype), out=buffers['label']).mul_(temperature).exp_()
    total = call.reduce.sum(probs.sum(-1, dtype=torch.float64))
    value = (largest[:, 0] * temperature + total.log()).to(zs.dtype) - picked * temperature
    return value * label.counts, probs, (1 / total).to(zs.dtype)


def _top1(call: Call, z: Tensor, largest: Tensor) -> Tensor:
    """The id [rows] of the largest logit, the first of equal ones."""
    value, column = z.max(-1)
    found = (column + call.first_id).masked_fill(value < largest[:, 0], torch.iinfo(torch.long).max)
    return call.reduce.min(found)


def _detail(call: Call, rows: slice, sides, norms, label: _Label | None, buffers: _Buffers, record: _Record) -> None:
    """Entropies, top-1 agreement and the teacher's probability of the label, from logits and probabilities."""
    entropies = call.reduce.sum(
        torch.stack(
            [-torch.sub(z, norm.to(z.dtype), out=buffers['e']).mul_(p).sum(-1) for (z, p), (_, norm) in zip(sides, norms, strict=False)]
        )
    )
    record(rows, student_entropy=entropies[0])
    if call.teacher:
        best = [_top1(call, z, largest) for (z, _), (largest, _) in zip(sides, norms, strict=False)]
        record(rows, teacher_entropy=entropies[1], top1_agreement=best[0] == best[1])
        if label is not None:
            record(rows, teacher_prob_of_label=label.pick(call.reduce, sides[1][1]))
