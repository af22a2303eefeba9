"""One pass over chunks of tokens: the engine under all operators.

for each chunk of tokens      logits of both sides (matrix products, fp32)
    for each block of rows    normalise, sum up, gradient, by one of the three implementations of `sweeps.py`
    gradient of the chunk     to the hidden states, and to the head where it is trained

What is known of the tokens is left in memory of their own, and made into losses and statistics once, after the last chunk.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import memory
from ._eager import Eager
from .clipping import Clipping
from .extrapolation import extrapolate
from .gradients import HeadGradients, ReadyGradients
from .heads import LinearHead, ReadyLogits
from .kinds import Divergence
from .sharding import Reduce, Vocabulary
from .stats import TokenStats
from .sweeps import Logits, Setting, Sweeps, Tokens
from .topk import Listed, TopKTeacher

# Two buffers of a chunk's logits take about this much. Larger chunks do not make the matrix products faster.
_CHUNK_BYTES = {'cpu': 320 << 20, 'cuda': 640 << 20}


@dataclass(frozen=True)
class LogitsTeacher:
    """A teacher with logits: pieces (first column, head) that cover the columns of this rank."""

    heads: list[tuple[int, LinearHead | ReadyLogits]]
    difference: bool = False  # they give the teacher's logits minus the student's
    reference: list[tuple[int, LinearHead | ReadyLogits]] | None = None  # pieces of what the teacher is extrapolated from
    extrapolation: float = 1.0

    def logits(self, rows: slice, out: Tensor, spare: Tensor) -> None:
        """Fill out [rows, columns]. spare: memory of the same shape, for the reference's."""
        _fill(self.heads, rows, out)
        if self.reference is not None:
            _fill(self.reference, rows, spare)
            masked = any(head.may_mask for _, head in (*self.heads, *self.reference))
            extrapolate(out, spare, self.extrapolation, masked)


def _fill(heads: list[tuple[int, LinearHead | ReadyLogits]], rows: slice, out: Tensor) -> None:
    for first, head in heads:
        head.logits(rows, out if head.columns == out.shape[1] else out[:, first : first + head.columns])


@dataclass(frozen=True)
class Weights:
    """Of the tokens of a call, [tokens] each."""

    divergence: Tensor
    labels: Tensor | None = None  # ids; those outside the vocabulary count for nothing
    cross_entropy: Tensor | None = None  # of any sign; None: it is not part of the loss
    label_temperature: float | Tensor = 1.0  # of the cross-entropy, of all tokens or of each
    clipping: Clipping | None = None  # of what the cross-entropy's weights then weigh in its place
    teacher_logprobs: Tensor | None = None  # of the labels; the divergence's weights then weigh its estimate; NaN where there is none

    def scaled(self, by: Tensor) -> 'Weights':
        return replace(self, divergence=self.divergence * by, cross_entropy=None if self.cross_entropy is None else self.cross_entropy * by)


@dataclass(frozen=True)
class Call:
    """One call of an operator, checked."""

    divergence: Divergence
    student: LinearHead | ReadyLogits
    teacher: LogitsTeacher | TopKTeacher | None
    weights: Weights
    vocabulary: Vocabulary
    chunk: int | None  # tokens, or None to choose
    stats: TokenStats | None

    @property
    def tokens(self) -> int:
        return len(self.student.hidden)

    @property
    def device(self) -> torch.device:
        return self.student.hidden.device

    @property
    def setting(self) -> Setting:
        student, at = self.student, self.weights.label_temperature
        at = None if isinstance(at, Tensor) else float(at)
        return Setting(self.divergence, self.vocabulary, float(student.temperature), student.softcap, student.dtype, self.device, at)


def chunk_tokens(columns: int, itemsize: int, device: str, buffers: bool = False) -> int:
    """How many tokens' logits exist at a time, from the shape and the device: a multiple of 64, and at least 64. Every chunk
    has its reductions over a group, so there `columns` are those of the widest rank, for all to choose alike. buffers:
    whether elementwise buffers as large as the chunk come with them."""
    budget = _CHUNK_BYTES['cpu' if device == 'cpu' else 'cuda'] // (4 if buffers else 1)
    return max(64, budget // (2 * itemsize * columns) // 64 * 64)


def run(call: Call, gradients: HeadGradients | ReadyGradients | None, implementation: type[Sweeps]) -> tuple[Tensor, Weights]:
    """The loss of each token [tokens], whose sum's gradient goes to `gradients`; and weights that give the same gradient without a
    clipping."""
    student, teacher, device, width = call.student, call.teacher, call.device, call.vocabulary.columns
    sweeps = implementation(call.setting)
    buffers = call.vocabulary.reduce.group is not None and isinstance(sweeps, Eager)
    chunk = call.chunk or chunk_tokens(call.vocabulary.widest, student.dtype.itemsize, device.type, buffers)
    chunk = min(chunk, max(call.tokens, 1))
    block = sweeps.rows(chunk)
    student_logits = memory.Rows(chunk, width, student.dtype, device)
    teacher_logits = memory.Rows(chunk, width, student.dtype, device) if isinstance(teacher, LogitsTeacher) else None
    tokens = _tokens(call)
    for start in range(0, call.tokens, chunk):
        rows = slice(start, min(start + chunk, call.tokens))
        n = rows.stop - rows.start
        logits = Logits(student_logits[0:n], None)
        if teacher_logits is not None:
            logits = Logits(logits.student, teacher_logits[0:n], teacher.difference)
            teacher.logits(rows, logits.teacher, spare=logits.student)  # first: the student's place is still free
        student.logits(rows, logits.student)
        into = None
        if gradients is not None:
            into = logits.student if sweeps.in_place else gradients.place(rows, logits.student)
        for top in range(0, n, block):
            inner = slice(top, min(top + block, n))
            outer = slice(start + inner.start, start + inner.stop)
            part = logits if block >= n else logits.rows(inner)
            # In place means this very tensor: to a compiled sweep another view is other memory.
            here = None if into is None else part.student if into is logits.student else into[inner]
            _work_on(call, sweeps, outer, part, tokens.part(outer), here)
        if gradients is not None:
            gradients.add(rows, into)
    return _losses(call, tokens), _unclipped(call.weights, tokens)


def _tokens(call: Call) -> Tokens:
    """Memory for what will be known of all tokens of a call."""
    n, weights, student = call.tokens, call.weights, call.student
    detail = call.stats is not None and call.stats.detail
    sides = 2 if isinstance(call.teacher, LogitsTeacher) else 1

    def new(*shape: int, dtype: torch.dtype = student.dtype) -> Tensor:
        return torch.zeros(*shape, n, dtype=dtype, device=call.device)

    norms = new(sides + (weights.labels is not None), dtype=torch.float64)
    tokens = Tokens(weights.labels, None, None, norms, norms[:sides])
    if weights.labels is not None:
        at, scale = weights.label_temperature, call.setting.label_scale
        tokens.label_lse, tokens.label_logit = norms[sides], new()
        tokens.label_scale = (student.temperature / at.double()).to(student.dtype) if scale is None else new().fill_(scale)
        if weights.cross_entropy is not None:
            at = at.to(student.dtype) if scale is None else at
            tokens.label_weight = weights.cross_entropy.to(student.dtype) * _counts(call) * (student.slope / at)
        if weights.clipping is not None:
            tokens.log_ratio = new(dtype=torch.float64)
    if call.teacher is not None:
        tokens.weight = weights.divergence.to(student.dtype) * (student.slope / student.temperature)
        tokens.sums = new(2)
    if detail:
        tokens.top, tokens.best, tokens.entropy = new(2), new(2, dtype=torch.long), new(2)
        if call.teacher is not None:
            tokens.kls, tokens.label_prob = new(2), new()
        if isinstance(call.teacher, TopKTeacher):
            tokens.mass = new()
    return tokens


def _work_on(call: Call, sweeps: Sweeps, rows: slice, logits: Logits, tokens: Tokens, into: Tensor | None) -> None:
    """What there is to know of a block of rows, into `tokens`. The gradient of their losses with respect to the head's products
    goes to `into`, which may be the student's logits, or is not made at None."""
    teacher, reduce = call.teacher, call.vocabulary.reduce
    if tokens.label is not None:
        sweeps.take(logits.student, tokens.label[:, None], tokens.label_logit[:, None])
    by_logprob, dense, listed = _weighs_by_logprob(call.weights), isinstance(teacher, LogitsTeacher), None
    # Those take what is known after the first sweep.
    if dense and into is not None and not by_logprob and reduce.group is None and sweeps.at_once(logits, tokens, into):
        return
    if isinstance(teacher, TopKTeacher):
        ids = teacher.ids[rows]
        listed = Listed(teacher, rows, reduce.sum(sweeps.take(logits.student, ids, logits.student.new_empty(ids.shape), erase=True)))
    sweeps.normalise(logits, tokens)
    if reduce.group is not None:
        _over_group(sweeps, reduce, tokens)
    if by_logprob:
        reduce.sum(tokens.label_logit)
        _weigh_by_logprob(call, rows, tokens, tokens.label_lse if listed is None else listed.label_lse(tokens))
    if listed is not None:
        tail_weight, per_id = sweeps.compare(listed, tokens)
    elif teacher is not None:
        if tokens.kls is not None:
            _compare_in_detail(call, sweeps, logits, tokens)
        here = tokens.sums if reduce.group is None else tokens.sums.new_empty(tokens.sums.shape)
        sweeps.sums(call.divergence, logits, tokens, here)
        if here is not tokens.sums:
            tokens.sums.copy_(reduce.sum(here))
    if into is None:
        return
    if dense:
        sweeps.gradient(logits, tokens, into)
    elif listed is None:
        sweeps.tail_gradient(logits, tokens, None, into)
    else:
        sweeps.tail_gradient(logits, tokens, tail_weight, into)
        sweeps.put(listed.ids, per_id, into)


def _weighs_by_logprob(weights: Weights) -> bool:
    """Whether the weights of the labels' gradient depend on their log-probabilities."""
    return weights.clipping is not None or weights.teacher_logprobs is not None


def _weigh_by_logprob(call: Call, rows: slice, tokens: Tokens, label_lse: Tensor) -> None:
    """The labels' ratios, and the weights of their gradient. label_lse: [rows], of all columns."""
    weights, logprobs = call.weights, tokens.label_logit.to(torch.float64, copy=True).mul_(tokens.label_scale).sub_(label_lse)
    if weights.clipping is not None:  # of the cross-entropy's weights alone
        tokens.log_ratio.copy_(weights.clipping.log_ratio(rows, logprobs))
        tokens.label_weight.mul_(weights.clipping.slope(tokens.log_ratio, weights.cross_entropy[rows]))
    if weights.teacher_logprobs is not None:
        ahead = _where_told(weights.teacher_logprobs[rows] - logprobs).mul_(weights.divergence[rows])
        at = weights.label_temperature
        ahead *= call.student.slope / (at[rows] if isinstance(at, Tensor) else at)
        tokens.label_weight.add_(ahead * _counts(call, rows))


def _where_told(values: Tensor) -> Tensor:
    """0 where the teacher has said nothing; infinite values stay, so that a loss which is none is seen."""
    return values.masked_fill(values.isnan(), 0)


def _unclipped(weights: Weights, tokens: Tokens) -> Weights:
    """For a second pass, which scales the gradient by a number of any sign: what is clipped is settled by then."""
    if weights.clipping is None:
        return weights
    slope = weights.clipping.slope(tokens.log_ratio, weights.cross_entropy)
    return replace(weights, cross_entropy=weights.cross_entropy * slope, clipping=None)


def _over_group(sweeps: Sweeps, reduce: Reduce, tokens: Tokens) -> None:
    """From what each rank knows of its columns to what is true of all: one all-gather, in detail four."""
    here = reduce.gather(tokens.norms)
    sweeps.combine(here, tokens.norms)
    if tokens.entropy is None:
        return
    sides = len(tokens.lse)
    share = here[:, :sides] - tokens.lse  # the logarithm of a rank's
    top, best, entropy = (reduce.gather(x[:sides]) for x in (tokens.top, tokens.best, tokens.entropy))
    tokens.top[:sides] = top.amax(0)
    tokens.best[:sides] = best.masked_fill(top < top.amax(0), torch.iinfo(torch.long).max).amin(0)
    tokens.entropy[:sides] = (share.exp() * (entropy - share)).sum(0)


def _compare_in_detail(call: Call, sweeps: Sweeps, logits: Logits, tokens: Tokens) -> None:
    """Both KLs and the teacher's probability of the label."""
    for kind, out in (('forward_kl', tokens.kls[:1]), ('reverse_kl', tokens.kls[1:])):
        sweeps.sums(Divergence(kind), logits, tokens, out)
    reduce = call.vocabulary.reduce
    reduce.sum(tokens.kls)
    if tokens.label is not None:
        logit, label = tokens.label_prob[:, None], tokens.label[:, None]
        sweeps.take(logits.teacher, label, logit)
        if logits.difference:
            logit += sweeps.take(logits.student, label, torch.empty_like(logit))
        tokens.label_prob.copy_((reduce.sum(logit)[:, 0] - tokens.lse[1]).exp())


def _counts(call: Call, rows: slice = slice(None)) -> Tensor:
    """1 for tokens whose label is one of the vocabulary, else 0."""
    labels = call.weights.labels[rows]
    return ((labels >= 0) & (labels < call.vocabulary.size)).to(call.student.dtype)


def _losses(call: Call, tokens: Tokens) -> Tensor:
    """Of each token; and the statistics."""
    weights, dtype = call.weights, call.student.dtype
    loss = torch.zeros(call.tokens, dtype=dtype, device=call.device)
    found = {}
    if tokens.label is not None:
        logit = tokens.label_logit if _weighs_by_logprob(weights) else call.vocabulary.reduce.sum(tokens.label_logit)
        found['cross_entropy'] = (tokens.label_lse - logit.double() * tokens.label_scale.double()).to(dtype) * _counts(call)
        weighed = found['cross_entropy']
        if weights.clipping is not None:
            ratio, beyond = weights.clipping.bounded(tokens.log_ratio, weights.cross_entropy)
            weighed = torch.where(ratio.isnan(), weighed, -ratio.to(dtype) * _counts(call))
            found['clipped'] = beyond * _counts(call)
        if weights.cross_entropy is not None:
            loss += weights.cross_entropy.to(dtype) * weighed
    if tokens.sums is not None:
        found['divergence'] = tokens.sums[0]
    elif weights.teacher_logprobs is not None:
        found['divergence'] = _where_told(-found['cross_entropy'] - weights.teacher_logprobs.to(dtype)) * _counts(call)
    if 'divergence' in found:
        loss += weights.divergence.to(dtype) * found['divergence']
    if call.stats is None:
        return loss
    call.stats.clear()
    if call.stats.detail:
        found['student_entropy'] = tokens.entropy[0]
        if call.teacher is not None:
            found |= dict(forward_kl=tokens.kls[0], reverse_kl=tokens.kls[1], teacher_entropy=tokens.entropy[1])
            found['top1_agreement'] = tokens.best[0] == tokens.best[1]
            if tokens.label is not None:
                found['teacher_prob_of_label'] = tokens.label_prob * _counts(call)
        if tokens.mass is not None:
            found['student_mass_on_topk'] = tokens.mass
    for name, values in found.items():
        setattr(call.stats, name, values.detach().to(torch.float32))
    return loss
