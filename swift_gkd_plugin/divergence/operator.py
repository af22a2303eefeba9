"""The operators: output heads and divergence, with all gradients in closed form."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import implementations
from .chunks import Call, LogitsTeacher, Weights, run
from .clipping import Clipping
from .extrapolation import Reference
from .gradients import Found, HeadGradients, ReadyGradients
from .heads import LinearHead, LogitTransform, ReadyLogits
from .kinds import Divergence
from .sharding import Vocabulary, realigned, shard_widths, spans
from .stats import TokenStats
from .topk import TopKTeacher

Lora = tuple[Tensor, Tensor, float]


class _Side(NamedTuple):
    """What a model's logits are made of."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora: Lora | None
    transform: LogitTransform | None


class _Operator(torch.autograd.Function):
    """Loss per token, or its sum. The tensors that may need a gradient are arguments so that autograd sees them.

    A sum has its gradients made in the forward pass, and its backward scales them: in place, so that a head's gradient
    exists once; a second backward through the same result is refused by autograd. For per-token losses the weights of
    the tokens are known in the backward pass only. The gradient of a token's own hidden state scales with its weight;
    that of a trained head does not, and is made by a second pass.
    """

    @staticmethod
    def forward(ctx, call: Call, reduction: str, grad_enabled: bool, *tensors: Tensor | None):
        ctx.reduction = reduction
        ctx.wanted = tuple(grad_enabled and t is not None and n for t, n in zip(tensors, ctx.needs_input_grad[3:], strict=False))
        ctx.second_pass = reduction == 'none' and any(ctx.wanted[1:])
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in tensors]
        with torch.autocast(tensors[0].device.type, enabled=False):
            gradients = _gradients(call, ctx.wanted, late=True) if any(ctx.wanted) and not ctx.second_pass else None
            loss, weights = run(call, gradients, implementations.choose(call))
            if ctx.second_pass:
                ctx.call = replace(call, weights=weights)
                ctx.save_for_backward(*tensors)
            else:
                ctx.save_for_backward(*(gradients.finish().tensors if gradients is not None else ()))
        return loss.sum() if reduction == 'sum' else loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        if not ctx.second_pass:
            found = Found.of(ctx.saved_tensors)
            scale = upstream if ctx.reduction == 'sum' else upstream[:, None]
        else:
            call = replace(
                ctx.call,
                student=ctx.call.student.with_tensors(*ctx.saved_tensors),
                stats=None,
                weights=ctx.call.weights.scaled(upstream),
            )
            with torch.autocast(upstream.device.type, enabled=False):
                gradients = _gradients(call, ctx.wanted, late=False)
                run(call, gradients, implementations.choose(call))
                found = gradients.finish()
            scale = None  # the weights of the tokens have it
        with torch.autocast(upstream.device.type, enabled=False):
            return None, None, None, *found.scaled(scale, ctx.like)


def _gradients(call: Call, wanted: tuple[bool, ...], late: bool) -> HeadGradients | ReadyGradients:
    if isinstance(call.student, ReadyLogits):
        return ReadyGradients(call.student)
    return HeadGradients(call.student, wanted, call.vocabulary.reduce, late)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    divergence: Divergence,
    *,
    token_weights: Tensor | None = None,
    reduction: str = 'none',
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
    student_lora: Lora | None = None,
    teacher_lora: Lora | None = None,
    reference: Reference | None = None,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    label_temperature: float | Tensor = 1.0,
    clipping: Clipping | None = None,
    teacher_logprobs: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    vocab_group=None,
    stats: TokenStats | None = None,
) -> Tensor:
    """Divergence between two models from their last hidden states and output heads; their logits never exist whole.

    The loss of a token is `token_weights · D(teacher, student) + label_weights · CE(label)`.

    Args:
        student_hidden: [tokens, student_dim], fp32, bf16, fp16 or fp64.
        student_weight: [student_vocab, student_dim]. A head that requires no gradient costs none, in time or memory.
        teacher_hidden: [tokens, teacher_dim], or None (with teacher_weight None) for cross-entropy only. No gradient
            goes there.
        teacher_weight: [teacher_vocab, teacher_dim].
        divergence: the kind and its temperature.
        token_weights: [tokens] weight of each token's divergence, a constant; None for ones.
        reduction: 'sum' returns the sum over tokens as a scalar. All gradients are made in the forward pass and the
            backward pass scales them, once. 'none' returns [tokens], differentiable under any weighting; the gradient
            of a trained head (weight, bias or LoRA) then costs a second pass over the logits.
        student_bias, teacher_bias: [vocab], added to the products.
        student_transform, teacher_transform: what the model does to its logits after the head.
        student_lora, teacher_lora: (A [rank, dim], B [vocab, rank], scaling), a low-rank term of the head.
        reference: puts T^λ · R^(1-λ), normalised, in the place of the teacher's distribution T, with R the reference's; what is said of
            the teacher here is then true of that, statistics included. It costs a product more per chunk and no memory. Where it has
            the teacher's head, which is linear and like the hidden states in fp32 or fp64, these are mixed and it costs nothing.
        labels: [tokens] long; those outside [0, vocab_size), -100 for instance, have no cross-entropy.
        label_weights: [tokens] weight of the cross-entropy, a constant of any sign: a policy gradient's are the advantages of
            sampled tokens. None: labels are for `stats` only, or weighted by ones where there is no teacher.
        label_temperature: what the logits are divided by for the cross-entropy, -log softmax(z / label_temperature)[label];
            one positive number for all tokens, or [tokens] of them, whose values are not checked. Where one number for all is
            the divergence's own temperature, there is one exponential per logit less.
        clipping: puts importance ratios, clipped as in PPO, in the place of cross-entropies of tokens that an older policy
            sampled; label_weights, which it needs, are their advantages.
        teacher_logprobs: [tokens] log T(label), of a teacher of which nothing else is known (teacher_hidden None); labels are
            tokens that the student sampled, at the label_temperature. In the place of D comes its estimate by one sample,
            log S(label) - log T(label), whose expectation is KL(student‖teacher), and the gradient is that of the policy gradient,
            (log S(label) - log T(label))·∇log S(label), whose expectation is the gradient of KL(student‖teacher). NaN: a token
            without one.
        vocab_size: number of leading ids over which both sides are normalised; default: the smaller vocabulary. Columns
            from there on are masked on both sides, with gradient 0.
        chunk_tokens: tokens whose logits exist at a time; chosen from the shape and the device by default.
        vocab_group: torch.distributed group whose ranks hold consecutive vocabulary rows of both heads (weight, bias
            and LoRA B), in rank order, possibly uneven. Every rank passes the same hidden states, weights and labels
            and gets the whole loss; head gradients are those of its rows, hidden-state (and LoRA A) gradients are
            all-reduced. Collectives per chunk, of a few numbers per token: an all-gather and an all-reduce; with
            `stats.detail` three of the former and two of the latter more. Per call: one all-gather of the ranks' numbers of
            rows, for which the host waits, one all-reduce of the labels' logits (with a clipping or teacher_logprobs one per
            chunk), one of the hidden-state gradient (one more for LoRA A), and where the two heads are split at different ids
            one all-to-all of teacher rows (one more each for a bias and for LoRA B), and so for a reference. The backward pass
            has none, but for reduction='none' with a trained head, where it is a second pass.
        stats: filled with per-token statistics.

    Returns:
        fp32 (fp64 from fp64 inputs) scalar or [tokens]. Always finite for finite hidden states; >= 0 for a divergence (its
        estimate by one sample has any sign), and exactly 0 where both sides' logits are equal. An empty token set gives 0 or
        an empty tensor, connected to the graph.

    Raises:
        ValueError: shapes that do not fit one another, naming both sizes; a label_temperature that is not positive and finite.
    """
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError('teacher_hidden and teacher_weight must be given together, or neither')
    sides = {'student': _Side(student_hidden, student_weight, student_bias, student_lora, student_transform)}
    if teacher_hidden is not None:
        sides['teacher'] = _Side(teacher_hidden, teacher_weight, teacher_bias, teacher_lora, teacher_transform)
    if reference is not None and (teacher_hidden is None or reference.weight is None):
        raise ValueError('a reference needs a teacher beside it, and a weight of its own')
    if reference is not None and reference.extrapolation != 1:
        sides['reference'] = _Side(reference.hidden, reference.weight, reference.bias, reference.lora, reference.transform)
    tokens = len(student_hidden)
    for name, side in sides.items():
        _check_head(name, side)
        if len(side.hidden) != tokens:
            raise ValueError(f'student_hidden has {tokens} tokens, {name}_hidden {len(side.hidden)}')
    vocabs = [len(side.weight) for side in sides.values()]
    parts = dict.fromkeys(sides)  # of the vocabulary, on every rank
    if vocab_group is None:
        vocabulary = Vocabulary.whole(_common_vocab(vocab_size, *vocabs))
    else:
        widths = shard_widths(vocab_group, vocabs, student_hidden.device)
        size = _common_vocab(vocab_size, *map(sum, widths))
        parts = {name: spans(of_head, size) for name, of_head in zip(sides, widths, strict=True)}
        vocabulary = Vocabulary.shard(size, widths[0], vocab_group)
    student = LinearHead(*sides['student'], vocabulary.columns, divergence.temperature)
    teacher = None if teacher_hidden is None else _linear_teacher(sides, parts, student, vocab_group, reference)
    weights = _weights(student, teacher, token_weights, labels, label_weights, label_temperature, clipping, teacher_logprobs)
    return _apply(Call(divergence, student, teacher, weights, vocabulary, chunk_tokens, stats), reduction)


def topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | None,
    topk_logprobs: Tensor,
    topk_ids: Tensor,
    divergence: Divergence,
    *,
    tail: str = 'bucket',
    topk_temperature: float | None = None,
    tail_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = 'none',
    student_bias: Tensor | None = None,
    student_transform: LogitTransform | None = None,
    student_lora: Lora | None = None,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    label_temperature: float | Tensor = 1.0,
    clipping: Clipping | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    vocab_group=None,
    stats: TokenStats | None = None,
) -> Tensor:
    """Divergence from a teacher of which k log-probabilities per token are known.

    Of the masses that the teacher's tail may have, the one counts at which the divergence is least: the value is never
    above that of the teacher's whole distribution.

    As `linear_divergence`, with in the teacher's place:

    Args:
        student_weight: None if student_hidden holds ready logits [tokens, vocab] (as in `logits_divergence`).
        topk_logprobs: [tokens, k] natural log-probabilities over the teacher's whole vocabulary. -inf marks an unused
            entry, so rows may be ragged; a row without entries has divergence 0.
        topk_ids: [tokens, k] long, distinct within a row. An id outside [0, vocab_size) counts as tail.
        tail: 'bucket' compares k ids and one bucket with the remaining mass of each side; 'renormalize' compares the
            two distributions renormalised over the k ids.
        topk_temperature: the temperature at which topk_logprobs were taken; default: the divergence's. Where they
            differ (an inference server's log-probabilities are at 1) they are brought to the divergence's, at which the
            mass of the teacher's tail is known to lie in an interval only: topk_logprobs must be the largest of their
            row then, and the teacher has no more columns than are compared, but for those that topk_ids names.
        tail_logprobs: [tokens] log of the teacher's mass on what is not listed, at topk_temperature, summed over just that;
            -inf for none. None: it is 1 - Σ exp(topk_logprobs), which rounding leaves unknown by 3e-5 (by four units in
            the last place from fp64). Without use where tail is 'renormalize'.
        vocab_size: default: the student's vocabulary.
        vocab_group: as in `linear_divergence`, every rank passing the same topk_logprobs and topk_ids (global ids).
            Collectives per chunk: an all-reduce and an all-gather; labels and statistics as there.
    """
    if student_weight is not None:
        _check_head('student', _Side(student_hidden, student_weight, student_bias, student_lora, student_transform))
    elif student_hidden.dim() != 2:
        raise ValueError(f'student_hidden must be logits [tokens, vocab] without a student_weight, got {list(student_hidden.shape)}')
    elif vocab_group is not None:
        raise ValueError('a vocab_group needs the student_weight of its ranks, ready logits are not sharded')
    if topk_logprobs.dim() != 2 or topk_logprobs.shape != topk_ids.shape:
        raise ValueError(f'topk_logprobs {list(topk_logprobs.shape)} and topk_ids {list(topk_ids.shape)} must both be [tokens, k]')
    if tail_logprobs is not None and tail_logprobs.shape != topk_ids.shape[:1]:
        raise ValueError(f'tail_logprobs {list(tail_logprobs.shape)} must be [tokens] like topk_ids {list(topk_ids.shape)}')
    if len(topk_ids) != len(student_hidden):
        raise ValueError(f'student_hidden has {len(student_hidden)} tokens, topk_ids {len(topk_ids)}')
    if tail not in ('bucket', 'renormalize'):
        raise ValueError(f"tail must be 'bucket' or 'renormalize', got {tail!r}")
    temperature = divergence.temperature
    if topk_temperature is None:
        topk_temperature = temperature
    elif not 0 < topk_temperature < float('inf'):
        raise ValueError(f'topk_temperature must be positive and finite, got {topk_temperature}')
    student_vocab = student_hidden.shape[1] if student_weight is None else len(student_weight)
    if vocab_group is None:
        vocabulary = Vocabulary.whole(_common_vocab(vocab_size, student_vocab))
    else:
        (widths,) = shard_widths(vocab_group, [student_vocab], student_hidden.device)
        vocabulary = Vocabulary.shard(_common_vocab(vocab_size, sum(widths)), widths, vocab_group)
    if topk_ids.shape[1] > vocabulary.size:
        raise ValueError(f'k = {topk_ids.shape[1]} is larger than the vocabulary of {vocabulary.size}')
    columns = vocabulary.columns
    if student_weight is None:
        student = ReadyLogits(student_hidden, columns, temperature)
    else:
        student = LinearHead(student_hidden, student_weight, student_bias, student_lora, student_transform, columns, temperature)
    teacher = TopKTeacher.of(topk_logprobs, topk_ids, tail, tail_logprobs, vocabulary.size, topk_temperature / temperature)
    weights = _weights(student, teacher, token_weights, labels, label_weights, label_temperature, clipping)
    return _apply(Call(divergence, student, teacher, weights, vocabulary, chunk_tokens, stats), reduction)


def logits_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    divergence: Divergence,
    *,
    reference: Reference | None = None,
    token_weights: Tensor | None = None,
    reduction: str = 'none',
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    label_temperature: float | Tensor = 1.0,
    clipping: Clipping | None = None,
    teacher_logprobs: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    stats: TokenStats | None = None,
) -> Tensor:
    """The dense path, for models whose head cannot be intercepted: the same numbers from ready logits.

    student_logits [tokens, student_vocab], teacher_logits [tokens, teacher_vocab] (or None, cross-entropy only) and those of a
    reference are whatever the models return, -inf columns included; the rest as in `linear_divergence`. Needs the gradient of
    the student's logits, in their dtype, and a chunk; nothing else of that size.
    """
    if reference is not None and (teacher_logits is None or reference.weight is not None):
        raise ValueError('a reference needs teacher_logits beside it, and ready logits of its own without a weight')
    given = dict(student_logits=student_logits, teacher_logits=teacher_logits)
    given['reference_logits'] = None if reference is None or reference.extrapolation == 1 else reference.hidden
    given = {name: logits for name, logits in given.items() if logits is not None}
    for name, logits in given.items():
        if logits.dim() != 2:
            raise ValueError(f'{name} must be [tokens, vocab], got {list(logits.shape)}')
        if len(logits) != len(student_logits):
            raise ValueError(f'student_logits has {len(student_logits)} tokens, {name} {len(logits)}')
    size = _common_vocab(vocab_size, *(logits.shape[1] for logits in given.values()))
    heads = [ReadyLogits(logits, size, divergence.temperature) for logits in given.values()]
    student, teacher = heads[0], None
    if len(heads) == 2:
        teacher = LogitsTeacher([(0, heads[1])])
    elif len(heads) == 3:
        teacher = LogitsTeacher([(0, heads[1])], reference=[(0, heads[2])], extrapolation=reference.extrapolation)
    weights = _weights(student, teacher, token_weights, labels, label_weights, label_temperature, clipping, teacher_logprobs)
    return _apply(Call(divergence, student, teacher, weights, Vocabulary.whole(size), chunk_tokens, stats), reduction)


def _linear_teacher(
    sides: dict[str, _Side], parts: dict[str, list | None], student: LinearHead, group, reference: Reference | None
) -> LogitsTeacher:
    """Args: parts: `spans` of each head; None without a group."""
    mine, theirs, other = (sides.get(name) for name in ('student', 'teacher', 'reference'))
    difference = student.plain and _same_head(mine, theirs) and (other is None or _same_head(other, theirs))
    if difference:
        start = mine.hidden.detach()
        theirs, other = (side and side._replace(hidden=side.hidden - start, bias=None) for side in (theirs, other))
    by = 1.0 if reference is None else reference.extrapolation
    # Of half-precision hidden states the mixture would be rounded, and with it what two close models differ by.
    if other is not None and _same_head(other, theirs) and theirs.hidden.dtype == theirs.weight.dtype == student.dtype:
        theirs, other = theirs._replace(hidden=torch.lerp(other.hidden, theirs.hidden, by)), None

    def heads(name: str, side: _Side | None) -> list[tuple[int, LinearHead]] | None:
        return None if side is None else _pieces(side, parts[name], parts['student'], student, group)

    return LogitsTeacher(heads('teacher', theirs), difference, heads('reference', other), by)


def _pieces(side: _Side, have, want, student: LinearHead, group) -> list[tuple[int, LinearHead]]:
    """(first column, head), which cover this rank's columns of the student. have, want: the ids of either on every rank."""
    a, b, scaling = side.lora or (None, None, None)
    rows = (side.weight, side.bias, b)
    if group is None:
        found = [(0, tuple(None if x is None else x[: student.columns] for x in rows))]
    else:
        first = want[torch.distributed.get_rank(group)][0]
        pieces = [None if x is None else realigned(x.detach(), have, want, group) for x in rows]
        found = [(start - first, tuple(None if x is None else x[i][1] for x in pieces)) for i, (start, _) in enumerate(pieces[0])]
    heads = []
    for column, (weight, bias, b_rows) in found:
        lora = None if b_rows is None else (a, b_rows, scaling)
        heads.append((column, LinearHead(side.hidden, weight, bias, lora, side.transform, len(weight), student.temperature)))
    return heads


def _weights(
    student,
    teacher,
    token_weights: Tensor | None,
    labels: Tensor | None,
    label_weights: Tensor | None,
    label_temperature: float | Tensor,
    clipping: Clipping | None,
    teacher_logprobs: Tensor | None = None,
) -> Weights:
    tokens = len(student.hidden)
    given = dict(token_weights=token_weights, labels=labels, label_weights=label_weights, label_temperature=label_temperature)
    given['teacher_logprobs'] = teacher_logprobs
    given |= {} if clipping is None else dict(old_logprobs=clipping.old_logprobs, log_ratios=clipping.log_ratios)
    for name, x in given.items():
        if isinstance(x, Tensor) and x.shape != (tokens,):
            raise ValueError(f'{name} must have shape [{tokens}] like the tokens, got {list(x.shape)}')
    if isinstance(label_temperature, Tensor):
        label_temperature = label_temperature.detach()
    elif not 0 < label_temperature < float('inf'):
        raise ValueError(f'label_temperature must be positive and finite, got {label_temperature}')
    if label_weights is not None and labels is None:
        raise ValueError('label_weights were given without labels')
    if teacher is None and labels is None:
        raise ValueError('without a teacher there must be labels')
    if teacher_logprobs is not None and teacher is not None:
        raise ValueError('teacher_logprobs are of a teacher of which nothing else is known; another one was given beside them')
    ones = torch.ones(tokens, dtype=student.dtype, device=student.hidden.device)
    if label_weights is None and teacher is None:
        label_weights = ones if teacher_logprobs is None else torch.zeros_like(ones)
    divergence = ones if token_weights is None else token_weights.detach()
    if clipping is not None:
        if label_weights is None:
            raise ValueError('a clipping needs label_weights: those that it clips')
        ratios = clipping.log_ratios
        clipping = replace(clipping, old_logprobs=clipping.old_logprobs.detach(), log_ratios=None if ratios is None else ratios.detach())
    if labels is None:
        return Weights(divergence)
    labels = labels.contiguous()  # kernels read them one after the other
    label_weights = None if label_weights is None else label_weights.detach()
    teacher_logprobs = None if teacher_logprobs is None else teacher_logprobs.detach()
    return Weights(divergence, labels, label_weights, label_temperature, clipping, teacher_logprobs)


def _apply(call: Call, reduction: str) -> Tensor:
    if reduction not in ('none', 'sum'):
        raise ValueError(f"reduction must be 'none' or 'sum', got {reduction!r}")
    if call.chunk is not None and call.chunk < 1:
        raise ValueError(f'chunk_tokens must be at least 1, got {call.chunk}')
    return _Operator.apply(call, reduction, torch.is_grad_enabled(), *call.student.tensors)


def _same_head(one: _Side, other: _Side) -> bool:
    """Whether logits are one linear function of the hidden states of both sides, up to a shared bias. The product of a difference of
    hidden states then gives that of the logits, rounded at its own size and not at theirs."""
    linear = one.lora is None and other.lora is None and one.transform == other.transform
    linear = linear and (one.transform is None or one.transform.softcap is None) and one.hidden.dtype == other.hidden.dtype
    return linear and _same_tensor(one.weight, other.weight) and _same_tensor(one.bias, other.bias)


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _common_vocab(vocab_size: int | None, *vocabs: int) -> int:
    smallest = min(vocabs)
    if vocab_size is None:
        return smallest
    if not 0 < vocab_size <= smallest:
        raise ValueError(f'vocab_size {vocab_size} must be positive and at most {smallest}, the smallest of the vocabularies')
    return vocab_size


def _check_head(side: str, head: _Side) -> None:
    hidden, weight, bias, lora, _ = head
    if hidden.dim() != 2:
        raise ValueError(f'{side}_hidden must be [tokens, dim], got {list(hidden.shape)}')
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f'{side}_weight {list(weight.shape)} does not fit {side}_hidden {list(hidden.shape)}: '
            f'dim {weight.shape[-1]} against {hidden.shape[1]}'
        )
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f'{side}_bias has {list(bias.shape)} entries for a vocabulary of {len(weight)}')
    if lora is not None:
        a, b, _ = lora
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != hidden.shape[1] or b.shape != (len(weight), len(a)):
            raise ValueError(
                f'{side}_lora A {list(a.shape)} and B {list(b.shape)} do not fit dim {hidden.shape[1]} and vocabulary {len(weight)}'
            )
