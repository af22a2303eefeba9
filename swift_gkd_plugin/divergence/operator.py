"""The operators: output heads and divergence, with all gradients in closed form."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import implementations
from .chunks import Call, LogitsTeacher, Weights, run
from .clipping import Clipping
from .gradients import Found, HeadGradients, ReadyGradients
from .heads import LinearHead, LogitTransform, ReadyLogits
from .kinds import Divergence
from .sharding import Vocabulary, realigned, shard_widths, spans
from .stats import TokenStats
from .topk import TopKTeacher

Lora = tuple[Tensor, Tensor, float]


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
            rows, for which the host waits, one all-reduce of the labels' logits (with a clipping one per chunk), one of the
            hidden-state gradient (one more for LoRA A), and where the two heads are split at different ids one all-to-all of
            teacher rows (one more each for a bias and for LoRA B). The backward pass has none, but for reduction='none' with
            a trained head, where it is a second pass.
        stats: filled with per-token statistics.

    Returns:
        fp32 (fp64 from fp64 inputs) scalar or [tokens]. Always finite for finite hidden states; >= 0 for a divergence (its
        estimate by one sample has any sign), and exactly 0 where both sides' logits are equal. An empty token set gives 0 or
        an empty tensor, connected to the graph.

    Raises:
        ValueError: shapes that do not fit one another, naming both sizes; a label_temperature that is not positive and finite.
    """
    _check_head('student', student_hidden, student_weight, student_bias, student_lora)
    if (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError('teacher_hidden and teacher_weight must be given together, or neither')
    tokens = len(student_hidden)
    student_vocab, teacher_vocab = len(student_weight), len(student_weight)
    if teacher_hidden is not None:
        _check_head('teacher', teacher_hidden, teacher_weight, teacher_bias, teacher_lora)
        if len(teacher_hidden) != tokens:
            raise ValueError(f'student_hidden has {tokens} tokens, teacher_hidden {len(teacher_hidden)}')
        teacher_vocab = len(teacher_weight)
    have = want = None
    if vocab_group is None:
        vocabulary = Vocabulary.whole(_common_vocab(vocab_size, student_vocab, teacher_vocab))
    else:
        widths = shard_widths(vocab_group, student_vocab, teacher_vocab, student_hidden.device)
        size = _common_vocab(vocab_size, *(sum(side) for side in zip(*widths, strict=False)))
        want, have = (spans(list(side), size) for side in zip(*widths, strict=False))
        vocabulary = Vocabulary.shard(size, [width for width, _ in widths], vocab_group)
    columns, temperature = vocabulary.columns, divergence.temperature
    student = LinearHead(student_hidden, student_weight, student_bias, student_lora, student_transform, columns, temperature)
    teacher = None
    if teacher_hidden is not None:
        difference = student.plain and _same_head(
            (student_hidden, student_weight, student_bias, student_lora, student_transform),
            (teacher_hidden, teacher_weight, teacher_bias, teacher_lora, teacher_transform),
        )
        if difference:
            teacher_hidden, teacher_bias = teacher_hidden - student_hidden.detach(), None
        a, b, scaling = teacher_lora or (None, None, None)
        heads = []
        rows = (teacher_weight, teacher_bias, b)
        for column, (weight, bias, b_rows) in _teacher_pieces(rows, columns, have, want, vocab_group):
            lora = None if b_rows is None else (a, b_rows, scaling)
            heads.append((column, LinearHead(teacher_hidden, weight, bias, lora, teacher_transform, len(weight), temperature)))
        teacher = LogitsTeacher(heads, difference)
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
        _check_head('student', student_hidden, student_weight, student_bias, student_lora)
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
        vocabulary = Vocabulary.whole(_common_vocab(vocab_size, student_vocab, student_vocab))
    else:
        widths = [width for width, _ in shard_widths(vocab_group, student_vocab, 0, student_hidden.device)]
        vocabulary = Vocabulary.shard(_common_vocab(vocab_size, sum(widths), sum(widths)), widths, vocab_group)
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

    student_logits [tokens, student_vocab] and teacher_logits [tokens, teacher_vocab] (or None, cross-entropy only) are
    whatever the models return, -inf columns included; the rest as in `linear_divergence`. Needs the gradient of the
    student's logits, in their dtype, and a chunk; nothing else of that size.
    """
    for name, logits in (('student_logits', student_logits), ('teacher_logits', teacher_logits)):
        if logits is not None and logits.dim() != 2:
            raise ValueError(f'{name} must be [tokens, vocab], got {list(logits.shape)}')
    if teacher_logits is not None and len(teacher_logits) != len(student_logits):
        raise ValueError(f'student_logits has {len(student_logits)} tokens, teacher_logits {len(teacher_logits)}')
    student_vocab = student_logits.shape[1]
    size = _common_vocab(vocab_size, student_vocab, student_vocab if teacher_logits is None else teacher_logits.shape[1])
    student, teacher = ReadyLogits(student_logits, size, divergence.temperature), None
    if teacher_logits is not None:
        teacher = LogitsTeacher([(0, ReadyLogits(teacher_logits, size, divergence.temperature))])
    weights = _weights(student, teacher, token_weights, labels, label_weights, label_temperature, clipping, teacher_logprobs)
    return _apply(Call(divergence, student, teacher, weights, Vocabulary.whole(size), chunk_tokens, stats), reduction)


def _teacher_pieces(rows: tuple[Tensor | None, ...], columns_here: int, have, want, group) -> list[tuple[int, tuple[Tensor | None, ...]]]:
    """(first column, rows) of the teacher's head (weight, bias, LoRA B) that cover this rank's columns."""
    if group is None:
        return [(0, tuple(None if x is None else x[:columns_here] for x in rows))]
    first = want[torch.distributed.get_rank(group)][0]
    pieces = [None if x is None else realigned(x.detach(), have, want, group) for x in rows]
    return [(start - first, tuple(None if x is None else x[i][1] for x in pieces)) for i, (start, _) in enumerate(pieces[0])]


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


def _same_head(student: tuple, teacher: tuple) -> bool:
    """Whether logits are one linear function of the hidden states of both sides, up to a shared bias. The product of
    teacher_hidden - student_hidden then gives the log-ratio, rounded at its own size and not at that of the logits."""
    (hidden_s, weight_s, bias_s, lora_s, transform_s), (hidden_t, weight_t, bias_t, lora_t, transform_t) = student, teacher
    linear = lora_s is None and lora_t is None and transform_s == transform_t and (transform_s is None or transform_s.softcap is None)
    return linear and hidden_s.dtype == hidden_t.dtype and _same_tensor(weight_s, weight_t) and _same_tensor(bias_s, bias_t)


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


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
