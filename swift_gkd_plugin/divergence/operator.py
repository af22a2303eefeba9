"""The operators: output heads and divergence in one pass over chunks of tokens.

    for each chunk of tokens      logits of both sides (matrix products, fp32)
        for each block of rows    normalise, divergence, statistics, gradient in place of the student's logits
        gradient of the chunk     to the hidden states, and to the head where it is trained
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .heads import LOWEST_LOGIT, HeadGradients, LinearHead, LogitTransform, ReadyGradients, ReadyLogits
from .kinds import Divergence, Scratch, columns
from .sharding import Reduce, realigned, shard_widths, spans
from .stats import TokenStats
from .topk import TopKTeacher, bucket_divergence, log_tail

Lora = tuple[Tensor, Tensor, float]

# Two buffers of a chunk's logits take about this much. Larger chunks do not make the matrix products faster.
_CHUNK_BYTES = {'cpu': 320 << 20, 'cuda': 640 << 20}
# Rows are worked on a few at a time, so that on a CPU the elementwise buffers stay in the last-level cache.
_BLOCK_ELEMENTS = {'cpu': 1 << 19, 'cuda': 1 << 25}


@dataclass
class _Call:
    """One call of an operator, checked. Columns are those of this rank, `columns` of them from the id `first_id` on."""

    divergence: Divergence
    student: LinearHead | ReadyLogits
    teacher: list                            # [(first column, head)] of a teacher with logits, else empty
    topk: TopKTeacher | None
    token_weights: Tensor                    # [tokens]
    labels: Tensor | None                 # [tokens], -100 for none
    label_weights: Tensor | None          # [tokens], None where the cross-entropy is not part of the loss
    vocab_size: int
    chunk: int
    reduce: Reduce
    first_id: int
    stats: TokenStats | None

    @property
    def tokens(self) -> int:
        return len(self.student.hidden)

    @property
    def has_teacher(self) -> bool:
        return bool(self.teacher) or self.topk is not None


def _run(call: _Call, gradients: HeadGradients | ReadyGradients | None) -> Tensor:
    """The loss of each token [tokens]; the gradient of their sum goes to `gradients`."""
    student = call.student
    device, dtype, width = student.hidden.device, student.dtype, student.columns
    kind = 'cpu' if device.type == 'cpu' else 'cuda'
    loss = torch.zeros(call.tokens, dtype=dtype, device=device)
    chunk = min(call.chunk, max(call.tokens, 1))
    # The reductions over a group are per chunk, so there a block is a whole chunk.
    block = chunk if call.reduce.group is not None else max(1, min(chunk, _BLOCK_ELEMENTS[kind] // max(width, 1)))
    scratch = _Buffers(block, width, dtype, device)
    student_logits = torch.empty(chunk * width, dtype=dtype, device=device)
    teacher_logits = torch.empty(chunk * width, dtype=dtype, device=device) if call.teacher else None
    record = _Record(call, loss)
    for start in range(0, call.tokens, chunk):
        rows = slice(start, min(start + chunk, call.tokens))
        n = rows.stop - rows.start
        zs = student_logits[:n * width].view(n, width)
        student.logits(rows, zs)
        zt = None
        if call.teacher:
            zt = teacher_logits[:n * width].view(n, width)
            for first, head in call.teacher:
                head.logits(rows, zt if head.columns == width else zt[:, first:first + head.columns])
        for top in range(0, n, block):
            inner = slice(top, min(top + block, n))
            outer = slice(start + inner.start, start + inner.stop)
            part = scratch.rows(inner.stop - inner.start)
            loss[outer] = _block(call, outer, zs[inner], None if zt is None else zt[inner], part, record, gradients is not None)
        if gradients is not None:
            gradients.add(rows, zs, teacher_logits)
    return loss


class _Buffers:
    """Elementwise buffers [block, width]: probabilities of both sides, and the four of `kinds.Scratch`; more when asked for."""

    def __init__(self, block: int, width: int, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device, self.memory = (block, width), dtype, device, {}
        self.n = block

    def rows(self, n: int) -> '_Buffers':
        self.n = n
        return self

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.memory:
            self.memory[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.memory[name][:self.n]

    def scratch(self) -> Scratch:
        return Scratch(self['e'], self['y'], self['h'], self['b'])


class _Record:
    """Per-token statistics of a call on their way into its TokenStats."""

    def __init__(self, call: _Call, like: Tensor):
        self.stats, self.like = call.stats, like

    def __call__(self, rows: slice, **values: Tensor) -> None:
        if self.stats is None:
            return
        for name, value in values.items():
            if getattr(self.stats, name) is None:
                setattr(self.stats, name, torch.zeros(self.like.shape, dtype=torch.float32, device=self.like.device))
            getattr(self.stats, name)[rows] = value.to(torch.float32)


def _normalise(sides: list[tuple[Tensor, Tensor]], reduce: Reduce) -> list[tuple[Tensor, Tensor]]:
    """For each (logits, out): fill out with softmax(logits), return (largest logit, log-sum-exp), each [rows, 1] in fp64.

    The log-sum-exp is read off the largest probability, so that one fused softmax is all the work. Sharded: one MAX and one
    SUM for all sides together.
    """
    largest = [z.amax(-1, keepdim=True) for z, _ in sides]
    if reduce.group is None:
        for z, out in sides:
            torch.softmax(z, -1, out=out)
        return [(m.double(), m.double() - out.amax(-1, keepdim=True).double().log())
                for m, (_, out) in zip(largest, sides, strict=False)]
    largest = reduce.max(torch.stack(largest))
    sums = reduce.sum(torch.stack([torch.sub(z, m, out=out).exp_().sum(-1, keepdim=True, dtype=torch.float64)
                                   for m, (z, out) in zip(largest, sides, strict=False)]))
    for total, (_, out) in zip(sums, sides, strict=False):
        out.mul_(1 / total)
    return [(m.double(), m.double() + total.log()) for m, total in zip(largest, sums, strict=False)]


def _block(call: _Call, rows: slice, zs: Tensor, zt: Tensor | None, buffers: _Buffers, record: _Record,
           want_gradient: bool) -> Tensor:
    """The loss of a block of rows. With want_gradient the gradient of their sum with respect to the head's products replaces zs.

    zs, zt: [rows, columns] logits divided by the temperature; both are overwritten.
    """
    temperature, slope = call.student.temperature, call.student.slope
    student = buffers['student']
    sides = [(zs, student)] + ([] if zt is None else [(zt, buffers['teacher'])])
    norms = _normalise(sides, call.reduce)
    label = None if call.labels is None else _Label.of(call, rows)
    if call.stats is not None and call.stats.detail:
        _detail(call, rows, sides, norms, label, record)

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
            value, gradient, factor = _topk_value_and_gradient(call, rows, zs, student, norms[0], label, buffers, record, want_gradient)
        else:
            value, gradient, factor = _value_and_gradient(call, rows, zs, zt, student, norms, buffers, record, want_gradient)
        record(rows, divergence=value)
        weights = call.token_weights[rows].to(zs.dtype)
        loss += weights * value
    if not want_gradient:
        return loss
    if call.student.softcap:  # d tanh = 1 - tanh², and the logits are softcap·tanh / temperature
        damping = zs.mul_(temperature / call.student.softcap).square_().neg_().add_(1)
        into = buffers['damped']
    else:
        damping, into = None, zs
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


def _value_and_gradient(call: _Call, rows: slice, zs: Tensor, zt: Tensor, student: Tensor, norms, buffers: _Buffers,
                        record: _Record, want_gradient: bool) -> tuple[Tensor, Tensor | None, float]:
    """D [rows] against a teacher with logits; its gradient with respect to zs, but for a factor; the factor."""
    log_ratio = zt.sub_(zs).sub_((norms[1][1] - norms[0][1]).to(zs.dtype))
    kl_sums = call.stats is not None and call.stats.detail
    found, kls = columns(call.divergence, student, buffers['teacher'], log_ratio, buffers.scratch(), kl_sums)
    sums = call.reduce.sum(torch.stack([found.value, found.centre, *(kls or ())]))
    if kls:
        record(rows, forward_kl=sums[-2], reverse_kl=sums[-1])
    if not want_gradient:
        return sums[0], None, 0.0
    return sums[0], found.gradient(student, sums[1]), found.factor


def _topk_value_and_gradient(call: _Call, rows: slice, zs: Tensor, student: Tensor, norm, label: '_Label | None',
                             buffers: _Buffers, record: _Record, want_gradient: bool) -> tuple[Tensor, Tensor | None, float]:
    """The same against a top-k teacher; `topk.py` has the mathematics."""
    teacher, ids, present = call.topk.entries(rows, call.vocab_size)
    column = ids - call.first_id
    here = present & (column >= 0) & (column < call.student.columns)
    column = column.masked_fill(~here, 0)
    logprobs = zs.gather(1, column) - norm[1]  # the buckets are few, so their arithmetic is in fp64
    outside = buffers['e'].copy_(student)
    outside.scatter_reduce_(1, column, (~here).to(zs.dtype), 'prod')  # 0 at the ids, whole elsewhere: no difference of sums
    sums = call.reduce.sum(torch.cat([logprobs.masked_fill(~here, 0), outside.sum(-1, keepdim=True, dtype=torch.float64)], 1))
    student_buckets, tail = sums[:, :-1].masked_fill(~present, LOWEST_LOGIT), sums[:, -1:]
    with_tail = call.topk.tail == 'bucket'
    if with_tail:
        student_buckets = torch.cat([student_buckets, tail.log().clamp_min(LOWEST_LOGIT)], 1)
        teacher = torch.cat([teacher, log_tail(teacher)], 1)
    detail = call.stats is not None and call.stats.detail
    found = bucket_divergence(call.divergence, student_buckets, teacher, call.topk.temperature / call.divergence.temperature, detail)
    if detail:
        record(rows, forward_kl=found.kls[0], reverse_kl=found.kls[1], teacher_entropy=found.teacher_entropy,
               student_mass_on_topk=sums[:, :-1].exp().mul_(present).sum(-1),
               top1_agreement=_top1(call, zs, norm[0]) == ids.gather(1, teacher[:, :ids.shape[1]].argmax(-1, keepdim=True))[:, 0])
        if label is not None:
            hit = present & (ids == call.labels[rows][:, None])
            record(rows, teacher_prob_of_label=(teacher[:, :ids.shape[1]].exp() * hit).sum(-1))
    if not want_gradient:
        return found.value.to(zs.dtype), None, 0.0
    per_id = found.gradient[:, :ids.shape[1]].masked_fill(~here, 0)
    if with_tail:
        per_mass = found.gradient[:, -1:] / tail.clamp_min(torch.finfo(tail.dtype).tiny)
        gradient = outside.mul_(per_mass.to(zs.dtype))
    else:
        gradient = outside.zero_()
    return found.value.to(zs.dtype), gradient.scatter_add_(1, column, per_id.to(zs.dtype)), 1.0


@dataclass
class _Label:
    """A block's labels. column: [rows, 1], local, 0 where the label is not here; here, counts: [rows] 0 or 1 as numbers."""

    column: Tensor
    here: Tensor
    counts: Tensor

    @classmethod
    def of(cls, call: _Call, rows: slice) -> '_Label':
        label = call.labels[rows]
        column = label - call.first_id
        here = (column >= 0) & (column < call.student.columns)
        counts = (label >= 0) & (label < call.vocab_size)
        dtype = call.student.dtype
        return cls(column.masked_fill(~here, 0)[:, None], here.to(dtype), counts.to(dtype))

    def pick(self, x: Tensor, reduce: Reduce) -> Tensor:
        return reduce.sum(x.gather(1, self.column)[:, 0] * self.here)


def _cross_entropy(call: _Call, label: _Label, zs: Tensor, student: Tensor, norm, buffers: _Buffers):
    """-log S(label) at temperature 1 [rows], that distribution up to a factor per row in a buffer of its own, and the factor."""
    largest, log_norm = norm
    temperature = call.student.temperature
    picked = label.pick(zs, call.reduce)
    if temperature == 1:
        return (log_norm[:, 0].to(zs.dtype) - picked) * label.counts, student, 1.0
    probs = torch.sub(zs, largest.to(zs.dtype), out=buffers['label']).mul_(temperature).exp_()
    total = call.reduce.sum(probs.sum(-1, dtype=torch.float64))
    value = (largest[:, 0] * temperature + total.log()).to(zs.dtype) - picked * temperature
    return value * label.counts, probs, (1 / total).to(zs.dtype)


def _top1(call: _Call, z: Tensor, largest: Tensor) -> Tensor:
    """The id [rows] of the largest logit, the first of equal ones."""
    value, column = z.max(-1)
    found = (column + call.first_id).masked_fill(value < largest[:, 0], torch.iinfo(torch.long).max)
    return call.reduce.min(found)


def _detail(call: _Call, rows: slice, sides, norms, label: _Label | None, record: _Record) -> None:
    """Entropies, top-1 agreement and the teacher's probability of the label, from logits and probabilities."""
    means = call.reduce.sum(torch.stack([torch.linalg.vecdot(p, z) for z, p in sides]))
    record(rows, student_entropy=norms[0][1][:, 0] - means[0])
    if call.teacher:
        best = [_top1(call, z, largest) for (z, _), (largest, _) in zip(sides, norms, strict=False)]
        record(rows, teacher_entropy=norms[1][1][:, 0] - means[1], top1_agreement=best[0] == best[1])
        if label is not None:
            record(rows, teacher_prob_of_label=label.pick(sides[1][1], call.reduce))


class _Operator(torch.autograd.Function):
    """Loss per token, or its sum. The tensors that may need a gradient are arguments so that autograd sees them.

    A sum has its gradients made in the forward pass, and its backward scales them: in place, so that a head's gradient exists
    once; a second backward through the same result is refused by autograd. For per-token losses the weights of the tokens
    are known in the backward pass only. The gradient of a token's own hidden state scales with its weight; that of a trained
    head does not, and is made by a second pass.
    """

    @staticmethod
    def forward(ctx, call: _Call, reduction: str, grad_enabled: bool, *tensors: Tensor | None):
        ctx.call, ctx.reduction = call, reduction
        ctx.wanted = tuple(grad_enabled and t is not None and n for t, n in zip(tensors, ctx.needs_input_grad[3:], strict=False))
        ctx.second_pass = reduction == 'none' and any(ctx.wanted[1:])
        with torch.autocast(tensors[0].device.type, enabled=False):
            gradients = _gradients(call, ctx.wanted) if any(ctx.wanted) and not ctx.second_pass else None
            loss = _run(call, gradients)
            if ctx.second_pass:
                ctx.save_for_backward(*tensors)
            else:
                ctx.call = None
                ctx.save_for_backward(*(gradients.finish() if gradients is not None else ()))
        return loss.sum() if reduction == 'sum' else loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if not ctx.second_pass:
            scale = upstream if ctx.reduction == 'sum' else upstream[:, None]
            found = [None if g is None else g.mul_(scale) for g in ctx.saved_tensors]
            return None, None, None, *found, *[None] * (len(ctx.wanted) - len(found))
        call = replace(ctx.call, student=ctx.call.student.with_tensors(*ctx.saved_tensors), stats=None,
                       token_weights=ctx.call.token_weights * upstream)
        if call.label_weights is not None:
            call = replace(call, label_weights=call.label_weights * upstream)
        with torch.autocast(upstream.device.type, enabled=False):
            gradients = _gradients(call, ctx.wanted)
            _run(call, gradients)
            return None, None, None, *gradients.finish()


def _gradients(call: _Call, wanted: tuple[bool, ...]) -> HeadGradients | ReadyGradients:
    if isinstance(call.student, ReadyLogits):
        return ReadyGradients(call.student)
    return HeadGradients(call.student, wanted, call.reduce)


def linear_divergence(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor | None,
                      teacher_weight: Tensor | None, divergence: Divergence, *, token_weights: Tensor | None = None,
                      reduction: str = 'none', student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
                      student_transform: LogitTransform | None = None,
                      teacher_transform: LogitTransform | None = None, student_lora: Lora | None = None,
                      labels: Tensor | None = None, label_weights: Tensor | None = None,
                      vocab_size: int | None = None, chunk_tokens: int | None = None, vocab_group=None,
                      stats: TokenStats | None = None) -> Tensor:
    """Divergence between two models from their last hidden states and output heads; no [tokens, vocab] tensor is made.

    The loss of a token is `token_weights · D(teacher, student) + label_weights · CE(label)`.

    Args:
        student_hidden: [tokens, student_dim], fp32, bf16, fp16 or fp64.
        student_weight: [student_vocab, student_dim]. A head that requires no gradient costs none, in time or memory.
        teacher_hidden: [tokens, teacher_dim], or None (with teacher_weight None) for cross-entropy only. No gradient goes there.
        teacher_weight: [teacher_vocab, teacher_dim].
        divergence: the kind and its temperature.
        token_weights: [tokens] weight of each token's divergence, a constant; None for ones.
        reduction: 'sum' returns the sum over tokens as a scalar. All gradients are made in the forward pass and the backward
            pass scales them, once. 'none' returns [tokens], differentiable under any weighting; the gradient of a trained
            head (weight, bias or LoRA) then costs a second pass over the logits.
        student_bias, teacher_bias: [vocab], added to the products.
        student_transform, teacher_transform: what the model does to its logits after the head.
        student_lora: (A [rank, student_dim], B [student_vocab, rank], scaling), a low-rank term of the head.
        labels: [tokens] long; those outside [0, vocab_size), -100 for instance, have no cross-entropy.
        label_weights: [tokens] weight of the cross-entropy, which is taken at temperature 1. None: labels are for `stats` only,
            or weighted by ones where there is no teacher.
        vocab_size: number of leading ids over which both sides are normalised; default: the smaller vocabulary. Columns from
            there on are masked on both sides, with gradient 0.
        chunk_tokens: tokens whose logits exist at a time; chosen from the shape and the device by default.
        vocab_group: torch.distributed group whose ranks hold consecutive vocabulary rows of both heads (weight, bias and
            LoRA B), in rank order, possibly uneven. Every rank passes the same hidden states, weights and labels and gets the
            whole loss; head gradients are those of its rows, hidden-state (and LoRA A) gradients are all-reduced.
            Collectives: per chunk three all-reduces of a few numbers per token (1 MAX, 2 SUM; with labels 1 SUM more, 2 at a
            temperature other than 1; with `stats.detail` 3 SUM and 2 MIN more at most); per call one all-reduce of
            the hidden-state gradient, and one all-to-all of teacher rows where the two heads are split at different ids.
            The backward pass has none, but for reduction='none' with a trained head.
        stats: filled with per-token statistics.

    Returns:
        fp32 (fp64 from fp64 inputs) scalar or [tokens]. Always finite for finite hidden states; >= 0 for a divergence, and
        exactly 0 where both sides' logits are equal. An empty token set gives 0 or an empty tensor, connected to the graph.

    Raises:
        ValueError: shapes that do not fit one another, naming both sizes.
    """
    _check_head('student', student_hidden, student_weight, student_bias, student_lora)
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError('teacher_hidden and teacher_weight must be given together, or neither')
    tokens = len(student_hidden)
    student_vocab, teacher_vocab = len(student_weight), len(student_weight)
    if teacher_hidden is not None:
        _check_head('teacher', teacher_hidden, teacher_weight, teacher_bias, None)
        if len(teacher_hidden) != tokens:
            raise ValueError(f'student_hidden has {tokens} tokens, teacher_hidden {len(teacher_hidden)}')
        teacher_vocab = len(teacher_weight)
    first_id, have, want = 0, None, None
    if vocab_group is not None:
        widths = shard_widths(vocab_group, student_vocab, teacher_vocab, student_hidden.device)
        student_vocab, teacher_vocab = (sum(side) for side in zip(*widths, strict=False))
    vocab_size = _common_vocab(vocab_size, student_vocab, teacher_vocab)
    columns_here = vocab_size
    if vocab_group is not None:
        want, have = (spans(list(side), vocab_size) for side in zip(*widths, strict=False))
        first_id, last = want[torch.distributed.get_rank(vocab_group)]
        columns_here = last - first_id
    student = LinearHead(student_hidden, student_weight, student_bias, student_lora, student_transform, columns_here,
                         divergence.temperature)
    teacher = []
    if teacher_hidden is not None:
        for column, weight, bias in _teacher_pieces(teacher_weight, teacher_bias, columns_here, have, want, vocab_group):
            teacher.append((column, LinearHead(teacher_hidden, weight, bias, None, teacher_transform, len(weight),
                                               divergence.temperature)))
    return _apply(student, teacher, None, divergence, token_weights, reduction, labels, label_weights, vocab_size, chunk_tokens,
                  Reduce(vocab_group), first_id, stats)


def topk_divergence(student_hidden: Tensor, student_weight: Tensor, topk_logprobs: Tensor, topk_ids: Tensor,
                    divergence: Divergence, *, tail: str = 'bucket', topk_temperature: float | None = None,
                    token_weights: Tensor | None = None, reduction: str = 'none', student_bias: Tensor | None = None,
                    student_transform: LogitTransform | None = None, student_lora: Lora | None = None,
                    labels: Tensor | None = None, label_weights: Tensor | None = None,
                    vocab_size: int | None = None, chunk_tokens: int | None = None, vocab_group=None,
                    stats: TokenStats | None = None) -> Tensor:
    """Divergence from a teacher of which k log-probabilities per token are known.

    As `linear_divergence`, with in the teacher's place:

    Args:
        topk_logprobs: [tokens, k] natural log-probabilities over the teacher's whole vocabulary. -inf marks an unused entry, so
            rows may be ragged; a row without entries has divergence 0.
        topk_ids: [tokens, k] long, distinct within a row. An id outside [0, vocab_size) counts as tail.
        tail: 'bucket' compares k ids and one bucket with the remaining mass of each side; 'renormalize' compares the two
            distributions renormalised over the k ids.
        topk_temperature: the temperature at which topk_logprobs were taken; default: the divergence's. Where they differ
            (an inference server's log-probabilities are at 1) both sides are bucketed at topk_temperature, and the buckets
            are tempered to the divergence's.
        vocab_size: default: the student's vocabulary.
        vocab_group: as in `linear_divergence`, every rank passing the same topk_logprobs and topk_ids (global ids).
            Collectives per chunk: 1 MAX, 2 SUM; labels and statistics as there.
    """
    _check_head('student', student_hidden, student_weight, student_bias, student_lora)
    if topk_logprobs.dim() != 2 or topk_logprobs.shape != topk_ids.shape:
        raise ValueError(f'topk_logprobs {list(topk_logprobs.shape)} and topk_ids {list(topk_ids.shape)} must both be [tokens, k]')
    if len(topk_ids) != len(student_hidden):
        raise ValueError(f'student_hidden has {len(student_hidden)} tokens, topk_ids {len(topk_ids)}')
    if tail not in ('bucket', 'renormalize'):
        raise ValueError(f"tail must be 'bucket' or 'renormalize', got {tail!r}")
    if topk_temperature is None:
        topk_temperature = divergence.temperature
    elif not 0 < topk_temperature < float('inf'):
        raise ValueError(f'topk_temperature must be positive and finite, got {topk_temperature}')
    student_vocab, first_id = len(student_weight), 0
    if vocab_group is not None:
        widths = [s for s, _ in shard_widths(vocab_group, student_vocab, 0, student_hidden.device)]
        student_vocab = sum(widths)
    vocab_size = columns_here = _common_vocab(vocab_size, student_vocab, student_vocab)
    if topk_ids.shape[1] > vocab_size:
        raise ValueError(f'k = {topk_ids.shape[1]} is larger than the vocabulary of {vocab_size}')
    if vocab_group is not None:
        first_id, last = spans(widths, vocab_size)[torch.distributed.get_rank(vocab_group)]
        columns_here = last - first_id
    student = LinearHead(student_hidden, student_weight, student_bias, student_lora, student_transform, columns_here,
                         topk_temperature)
    return _apply(student, [], TopKTeacher(topk_logprobs, topk_ids, tail, topk_temperature), divergence, token_weights, reduction,
                  labels, label_weights, vocab_size, chunk_tokens, Reduce(vocab_group), first_id, stats)


def logits_divergence(student_logits: Tensor, teacher_logits: Tensor | None, divergence: Divergence, *,
                      token_weights: Tensor | None = None, reduction: str = 'none', labels: Tensor | None = None,
                      label_weights: Tensor | None = None, vocab_size: int | None = None,
                      chunk_tokens: int | None = None, stats: TokenStats | None = None) -> Tensor:
    """The dense path, for models whose head cannot be intercepted: the same numbers from ready logits.

    student_logits [tokens, student_vocab] and teacher_logits [tokens, teacher_vocab] (or None, cross-entropy only) are
    whatever the models return, -inf columns included; the rest as in `linear_divergence`. Needs the gradient of the student's
    logits, in their dtype, and a chunk; nothing else of that size.
    """
    for name, logits in (('student_logits', student_logits), ('teacher_logits', teacher_logits)):
        if logits is not None and logits.dim() != 2:
            raise ValueError(f'{name} must be [tokens, vocab], got {list(logits.shape)}')
    student_vocab, teacher = student_logits.shape[1], []
    if teacher_logits is not None and len(teacher_logits) != len(student_logits):
        raise ValueError(f'student_logits has {len(student_logits)} tokens, teacher_logits {len(teacher_logits)}')
    vocab_size = _common_vocab(vocab_size, student_vocab, student_vocab if teacher_logits is None else teacher_logits.shape[1])
    student = ReadyLogits(student_logits, vocab_size, divergence.temperature)
    if teacher_logits is not None:
        teacher = [(0, ReadyLogits(teacher_logits, vocab_size, divergence.temperature))]
    return _apply(student, teacher, None, divergence, token_weights, reduction, labels, label_weights, vocab_size, chunk_tokens,
                  Reduce(None), 0, stats)


def _teacher_pieces(weight: Tensor, bias: Tensor | None, columns_here: int, have, want, group):
    """(first column, weight rows, bias rows) of the teacher's head that cover this rank's columns."""
    if group is None:
        return [(0, weight[:columns_here], None if bias is None else bias[:columns_here])]
    first = want[torch.distributed.get_rank(group)][0]
    weights = realigned(weight.detach(), have, want, group)
    biases = [(0, None)] * len(weights) if bias is None else realigned(bias.detach(), have, want, group)
    return [(start - first, w, b) for (start, w), (_, b) in zip(weights, biases, strict=False)]


def _apply(student, teacher, topk, divergence, token_weights, reduction, labels, label_weights, vocab_size, chunk_tokens, reduce,
           first_id, stats) -> Tensor:
    """Checks what all operators share, and calls autograd."""
    tokens, device = len(student.hidden), student.hidden.device
    if reduction not in ('none', 'sum'):
        raise ValueError(f"reduction must be 'none' or 'sum', got {reduction!r}")
    for name, x in (('token_weights', token_weights), ('labels', labels), ('label_weights', label_weights)):
        if x is not None and x.shape != (tokens,):
            raise ValueError(f'{name} must have shape [{tokens}] like the tokens, got {list(x.shape)}')
    if label_weights is not None and labels is None:
        raise ValueError('label_weights were given without labels')
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f'chunk_tokens must be at least 1, got {chunk_tokens}')
    has_teacher = bool(teacher) or topk is not None
    if not has_teacher and labels is None:
        raise ValueError('without a teacher there must be labels')
    ones = torch.ones(tokens, dtype=student.dtype, device=device)
    if labels is not None and label_weights is None and not has_teacher:
        label_weights = ones
    if chunk_tokens is None:
        budget = _CHUNK_BYTES['cpu' if device.type == 'cpu' else 'cuda']
        chunk_tokens = max(1, budget // (2 * student.dtype.itemsize * max(student.columns, 1)))
        chunk_tokens = max(64, chunk_tokens // 64 * 64)
    call = _Call(divergence, student, teacher, topk, ones if token_weights is None else token_weights.detach(), labels,
                 None if label_weights is None else label_weights.detach(), vocab_size, chunk_tokens, reduce, first_id, stats)
    return _Operator.apply(call, reduction, torch.is_grad_enabled(), *student.tensors)


def _common_vocab(vocab_size: int | None, student_vocab: int, teacher_vocab: int) -> int:
    smaller = min(student_vocab, teacher_vocab)
    if vocab_size is None:
        return smaller
    if not 0 < vocab_size <= smaller:
        raise ValueError(f'vocab_size {vocab_size} must be positive and at most {smaller}, the smaller of the two vocabularies')
    return vocab_size


def _check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None) -> None:
    if hidden.dim() != 2:
        raise ValueError(f'{side}_hidden must be [tokens, dim], got {list(hidden.shape)}')
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f'{side}_weight {list(weight.shape)} does not fit {side}_hidden {list(hidden.shape)}: '
                         f'dim {weight.shape[-1]} against {hidden.shape[1]}')
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f'{side}_bias has {list(bias.shape)} entries for a vocabulary of {len(weight)}')
    if lora is not None:
        a, b, _ = lora
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != hidden.shape[1] or b.shape != (len(weight), len(a)):
            raise ValueError(f'{side}_lora A {list(a.shape)} and B {list(b.shape)} do not fit dim {hidden.shape[1]} and '
                             f'vocabulary {len(weight)}')
