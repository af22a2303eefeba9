"""The operators around the mathematics: heads, weights, labels, vocabularies, partitions, memory, errors."""

import copy
import dataclasses
import errno
import io
import math

import divergence_reference as reference
import pytest
import torch
from divergence_reference import relative

from swift_gkd_plugin.divergence import (
    Divergence,
    LogitTransform,
    TokenStats,
    linear_divergence,
    logits_divergence,
    memory,
    topk_divergence,
)
from swift_gkd_plugin.divergence import gradients as products
from swift_gkd_plugin.divergence.kinds import KINDS

TOKENS, DIM, VOCAB, RANK = 23, 16, 300, 4
NAMES = ('hidden', 'weight', 'bias', 'a', 'b')


@pytest.fixture
def case():
    torch.manual_seed(0)
    double = dict(dtype=torch.float64)
    return {
        'hidden': torch.randn(TOKENS, DIM, **double),
        'weight': torch.randn(VOCAB, DIM, **double) * 0.5,
        'bias': torch.randn(VOCAB, **double),
        'a': torch.randn(RANK, DIM, **double),
        'b': torch.randn(VOCAB, RANK, **double) * 0.1,
        'other': torch.randn(TOKENS, 12, **double),
        'head': torch.randn(VOCAB + 10, 12, **double) * 0.5,
        'head_bias': torch.randn(VOCAB + 10, **double),
        'head_a': torch.randn(RANK, 12, **double),
        'head_b': torch.randn(VOCAB + 10, RANK, **double) * 0.1,
        'token_weights': torch.rand(TOKENS),
        'label_weights': torch.rand(TOKENS),
        'labels': torch.where(torch.rand(TOKENS) < 0.2, -100, torch.randint(VOCAB, (TOKENS,))),
    }


def run(case, dtype, divergence, reduction, **extra):
    """(loss, gradients of hidden, weight, bias, A, B) of the operator."""
    x = {n: case[n].to(dtype).requires_grad_() for n in NAMES}
    loss = linear_divergence(
        x['hidden'],
        x['weight'],
        case['other'].to(dtype),
        case['head'].to(dtype),
        divergence,
        token_weights=case['token_weights'],
        reduction=reduction,
        student_bias=x['bias'],
        teacher_bias=case['head_bias'].to(dtype),
        student_lora=(x['a'], x['b'], 0.5),
        teacher_lora=(case['head_a'].to(dtype), case['head_b'].to(dtype), 2.0),
        **extra,
    )
    return loss, torch.autograd.grad(loss.sum(), list(x.values()))


def expect(case, dtype, divergence, transform=None, teacher_transform=None, labels=False):
    x = {n: case[n].to(dtype).double().requires_grad_() for n in NAMES}
    student = reference.logits(x['hidden'], x['weight'], x['bias'], (x['a'], x['b'], 0.5), transform)
    teacher = reference.logits(
        case['other'].to(dtype).double(),
        case['head'].to(dtype).double(),
        case['head_bias'].to(dtype).double(),
        (case['head_a'].to(dtype).double(), case['head_b'].to(dtype).double(), 2.0),
        teacher_transform,
    )
    loss = case['token_weights'] * reference.divergence_of_logits(divergence, student, teacher)
    if labels:
        loss = loss + case['label_weights'] * reference.cross_entropy(student, case['labels'])
    return loss, torch.autograd.grad(loss.sum(), list(x.values()))


TRANSFORMS = [None, LogitTransform(scale=0.0625), LogitTransform(softcap=5.0), LogitTransform(scale=1.5, softcap=3.0)]


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-7), (torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize('transform', TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    'divergence',
    [Divergence(temperature=0.7), Divergence('forward_kl'), Divergence('tvd', temperature=2.0)],
    ids=lambda d: d.kind,
)
@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_head_labels_and_transforms(case, dtype, bound, transform, divergence, reduction):
    expected, gradients = expect(case, dtype, divergence, transform, TRANSFORMS[2], labels=True)
    loss, found = run(
        case,
        dtype,
        divergence,
        reduction,
        student_transform=transform,
        teacher_transform=TRANSFORMS[2],
        labels=case['labels'],
        label_weights=case['label_weights'],
        chunk_tokens=7,
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(loss, expected.sum() if reduction == 'sum' else expected) < min(bound, 1e-4)
    for name, one, right in zip(NAMES, found, gradients, strict=True):
        assert one.dtype == dtype and relative(one, right) < bound, name


def test_mixed_dtypes(case):
    """fp32 master weights under hidden states in bf16."""
    hidden, weight = case['hidden'].bfloat16().requires_grad_(), case['weight'].float().requires_grad_()
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = reference.divergence_of_logits(Divergence(), exact[0] @ exact[1].t(), case['other'] @ case['head'].t())
    loss = linear_divergence(hidden, weight, case['other'].float(), case['head'].float(), Divergence(), reduction='sum')
    loss.backward()
    gradients = torch.autograd.grad(expected.sum(), exact)
    assert relative(loss, expected.sum()) < 1e-5
    assert relative(hidden.grad, gradients[0]) < 5e-3 and relative(weight.grad, gradients[1]) < 1e-5
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_partition_does_not_matter(case, reduction):
    whole, gradients = run(case, torch.float32, Divergence(temperature=0.9), reduction, chunk_tokens=1000)
    for chunk in (1, 2, 5, 22, 23, None):
        loss, found = run(case, torch.float32, Divergence(temperature=0.9), reduction, chunk_tokens=chunk)
        assert torch.allclose(loss, whole, rtol=2e-6)
        for one, other in zip(found, gradients, strict=True):
            assert relative(one, other.double()) < 3e-6


def test_per_token_loss_is_differentiable_under_any_weighting(case):
    upstream = torch.rand(TOKENS)
    x = {n: case[n].float().requires_grad_() for n in NAMES[:2]}
    linear_divergence(*x.values(), case['other'].float(), case['head'].float(), Divergence()).backward(upstream)
    y = {n: case[n].float().requires_grad_() for n in NAMES[:2]}
    linear_divergence(
        *y.values(), case['other'].float(), case['head'].float(), Divergence(), token_weights=upstream, reduction='sum'
    ).backward()
    for name in x:
        assert relative(x[name].grad, y[name].grad.double()) < 1e-6


@pytest.mark.parametrize('reduction', ['sum', 'none'])
@pytest.mark.parametrize('ready', [False, True])
def test_a_loss_scale_saves_the_gradients_of_fp16(ready, reduction):
    """Gradients that fp16 has no numbers for are finite and right once a loss scale, which comes last, has made them larger."""
    torch.manual_seed(0)
    hidden, weight, other = torch.randn(6, 16).half(), (torch.randn(4096, 16) / 4).half(), torch.randn(6, 16).half()
    extra, found = {'token_weights': torch.full((6,), 5e-6), 'reduction': reduction}, []
    for dtype in (torch.float16, torch.float32):
        h, w, o = hidden.to(dtype), weight.to(dtype), other.to(dtype)
        if ready:
            x = [(hidden @ weight.t()).to(dtype).requires_grad_()]
            loss = logits_divergence(*x, (other @ weight.t()).to(dtype), Divergence(), **extra)
        else:
            x = [h.requires_grad_(), w.requires_grad_()]
            loss = linear_divergence(*x, o, w.detach().flip(0), Divergence(), **extra)
        found.append(torch.autograd.grad(loss.sum() * 65536, x))
    for one, right in zip(*found, strict=True):
        assert one.dtype == torch.float16
        assert relative(one, right.double()) < 1e-3


@pytest.mark.parametrize('wanted', [NAMES[:1], NAMES[:2], NAMES])
def test_gradients_kept_for_a_product_of_several_chunks(case, wanted, monkeypatch):
    """As on a GPU, here on a CPU: all of them, two chunks of them, one."""
    found = []
    for tokens in (23, 8, 4):
        monkeypatch.setattr(products, 'tokens_per_product', lambda *args, tokens=tokens: tokens)
        x = {n: case[n].bfloat16().requires_grad_(n in wanted) for n in NAMES}
        extra = {'student_bias': x['bias'], 'student_lora': (x['a'], x['b'], 2.0)} if len(wanted) > 2 else {}
        other, head = case['other'].bfloat16(), case['head'].bfloat16()
        loss = linear_divergence(x['hidden'], x['weight'], other, head, Divergence(), reduction='sum', chunk_tokens=4, **extra)
        found.append(torch.autograd.grad(loss, [x[n] for n in wanted]))
        assert [g.dtype for g in found[-1]] == [torch.bfloat16] * len(wanted)
    for fewer in found[1:]:
        for one, right in zip(fewer, found[0], strict=True):
            assert relative(one, right.double()) < 5e-3


@pytest.mark.parametrize('tokens_at_a_time, waits', [(23, True), (8, False)])
def test_the_scale_of_the_loss_rides_in_the_last_product(case, monkeypatch, tokens_at_a_time, waits):
    """Where one product makes the head's gradient it is made in the backward pass, from scaled hidden states; where it is a sum in
    fp32, that is scaled and made half precision in one pass. Either way there is no half-precision one that is not scaled."""
    monkeypatch.setattr(products, 'tokens_per_product', lambda *args: tokens_at_a_time)
    found, saved = [], []
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = (case[n].bfloat16().to(dtype).requires_grad_() for n in NAMES[:2])
        other, head = case['other'].bfloat16().to(dtype), case['head'].bfloat16().to(dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, list(t.shape))) or t, lambda t: t):
            loss = linear_divergence(hidden, weight, other, head, Divergence(), reduction='sum', chunk_tokens=4)
        found.append(torch.autograd.grad(loss * 0.3, [hidden, weight]))
    kept, whole = (torch.bfloat16, [TOKENS, VOCAB]), (torch.float32, [VOCAB, DIM])
    assert (kept in saved[:3]) == waits and (whole in saved[:3]) == (not waits) and (torch.bfloat16, [VOCAB, DIM]) not in saved
    for one, right in zip(*found, strict=True):
        assert one.dtype == torch.bfloat16 and relative(one, right.double()) < 5e-3


def test_tokens_of_a_product():
    """All where that takes no more than the fp32 sum which they replace."""
    for tokens, device, replaces_sum, expected in (
        (1024, 'cuda', True, 1024),
        (1025, 'cuda', True, 800),
        (1024, 'cuda', False, 800),
        (600, 'cuda', False, 600),
        (600, 'cpu', True, 600),
        (1025, 'cpu', True, 200),
        (600, 'cpu', False, 200),
    ):
        assert products.tokens_per_product(tokens, 512, 200, device, replaces_sum) == expected


def test_only_what_needs_a_gradient_gets_one(case):
    hidden, weight = case['hidden'].float().requires_grad_(), case['weight'].float()
    linear_divergence(hidden, weight, case['other'].float(), case['head'].float(), Divergence(), reduction='sum').backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        loss = linear_divergence(hidden, weight, case['other'].float(), case['head'].float(), Divergence(), reduction='sum')
    assert not loss.requires_grad


def test_no_hidden_gradient_product_for_a_frozen_student_body(case):
    hidden, weight = case['hidden'].float(), case['weight'].float().requires_grad_()
    linear_divergence(hidden, weight, case['other'].float(), case['head'].float(), Divergence(), reduction='sum').backward()
    assert hidden.grad is None and weight.grad is not None


def test_a_sum_scales_its_gradient_and_is_used_once(case):
    hidden = case['hidden'].float().requires_grad_()
    args = (case['weight'].float(), case['other'].float(), case['head'].float(), Divergence())
    (one,) = torch.autograd.grad(linear_divergence(hidden, *args, reduction='sum'), hidden)
    (tenth,) = torch.autograd.grad(linear_divergence(hidden, *args, reduction='sum') / 10, hidden)
    assert torch.allclose(tenth * 10, one)
    loss = linear_divergence(hidden, *args, reduction='sum')
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_autocast_does_not_reach_inside(case):
    hidden = case['hidden'].float()
    args = (hidden, case['weight'].float(), case['other'].float(), case['head'].float(), Divergence())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = linear_divergence(*args)
    assert torch.equal(inside, linear_divergence(*args))


@pytest.mark.parametrize('reduction, heads', [('sum', 1), ('none', 1)])
def test_saved_for_backward_is_the_gradients_or_the_inputs(reduction, heads):
    """Bytes saved do not grow with tokens × vocab: a sum keeps its gradients, per-token losses the student's inputs."""
    tokens, dim, vocab = 64, 8, 4000
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim, requires_grad=True)
    other, head = torch.randn(tokens, dim), torch.randn(vocab, dim)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t):
        linear_divergence(hidden, weight, other, head, Divergence(), reduction=reduction)
    assert sum(saved) <= 4 * (heads * vocab * dim + tokens * dim)


def test_empty_token_set_is_connected_to_the_graph(case):
    for reduction, shape in (('sum', ()), ('none', (0,))):
        hidden, weight = case['hidden'][:0].float().requires_grad_(), case['weight'].float().requires_grad_()
        loss = linear_divergence(hidden, weight, case['other'][:0].float(), case['head'].float(), Divergence(), reduction=reduction)
        assert loss.shape == shape and not loss.any()
        loss.sum().backward()
        assert hidden.grad.shape == (0, DIM) and not weight.grad.any()
    logits = torch.zeros(0, 5, requires_grad=True)
    logits_divergence(logits, torch.zeros(0, 5), Divergence(), reduction='sum').backward()
    topk_divergence(hidden, weight, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), Divergence()).sum().backward()


# ---- labels only, and the statistics ----


@pytest.mark.parametrize('temperature', [1.0, 0.3, 0.7, 2.7])
@pytest.mark.parametrize('teacher', ['none', 'dense', 'top-k'])
def test_cross_entropy_of_certain_tokens(teacher, temperature):
    """A logit of 100 over the temperature and times it again is off by 6e-6, but by the same for the label as for the sum."""
    hidden, weight, labels = reference.sure_of_its_labels(1001)
    divergence, stats = Divergence(temperature=temperature), TokenStats()
    if teacher == 'top-k':
        topk = torch.log_softmax(hidden @ weight.t() / temperature, -1).topk(3)
        topk_divergence(hidden, weight, *topk, divergence, labels=labels, stats=stats)
    else:
        other = (None, None) if teacher == 'none' else (hidden, weight)
        linear_divergence(hidden, weight, *other, divergence, labels=labels, stats=stats)
    assert stats.cross_entropy.abs().max() < 1e-6


def test_cross_entropy_alone(case):
    hidden, weight = case['hidden'].float().requires_grad_(), case['weight'].float().requires_grad_()
    loss = linear_divergence(hidden, weight, None, None, Divergence(temperature=0.5), labels=case['labels'])
    expected = reference.cross_entropy(case['hidden'] @ case['weight'].t(), case['labels'])
    assert relative(loss, expected) < 1e-5
    loss.sum().backward()
    exact = case['weight'].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference.cross_entropy(case['hidden'] @ exact.t(), case['labels']).sum(), exact)
    assert relative(weight.grad, gradient) < 1e-5


@pytest.mark.parametrize('dense', [False, True])
def test_statistics(case, dense):
    divergence, labels = Divergence(temperature=0.8), case['labels']
    student, teacher = case['hidden'] @ case['weight'].t(), case['other'] @ case['head'].t()
    stats = TokenStats(detail=True)
    if dense:
        logits_divergence(student.float(), teacher.float(), divergence, labels=labels, stats=stats, chunk_tokens=4)
    else:
        linear_divergence(
            case['hidden'].float(),
            case['weight'].float(),
            case['other'].float(),
            case['head'].float(),
            divergence,
            labels=labels,
            stats=stats,
            chunk_tokens=4,
        )
    log_s, log_t = (torch.log_softmax(z[:, :VOCAB] / 0.8, -1) for z in (student, teacher))
    of_label = log_t.exp().gather(1, labels.clamp_min(0)[:, None])[:, 0] * (labels >= 0)
    expected = {
        'divergence': reference.divergence_of_logits(divergence, student, teacher),
        'cross_entropy': reference.cross_entropy(student, labels),
        'forward_kl': reference.divergence_of_logits(Divergence('forward_kl', temperature=0.8), student, teacher),
        'reverse_kl': reference.divergence_of_logits(Divergence('reverse_kl', temperature=0.8), student, teacher),
        'student_entropy': -(log_s.exp() * log_s).sum(-1),
        'teacher_entropy': -(log_t.exp() * log_t).sum(-1),
        'top1_agreement': (log_s.argmax(-1) == log_t.argmax(-1)).double(),
        'teacher_prob_of_label': of_label,
    }
    for name, right in expected.items():
        found = getattr(stats, name)
        assert found.dtype == torch.float32 and not found.requires_grad
        assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-6), name
    assert stats.student_mass_on_topk is None


def test_labels_for_the_statistics_only_do_not_train(case):
    loss, gradients = run(case, torch.float32, Divergence(), 'sum')
    again, same = run(case, torch.float32, Divergence(), 'sum', labels=case['labels'], stats=TokenStats())
    assert torch.equal(loss, again) and all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


# ---- vocabularies ----


@pytest.mark.parametrize('student_vocab, teacher_vocab, vocab_size', [(300, 310, None), (310, 300, None), (300, 300, 250), (300, 310, 299)])
def test_both_sides_are_normalised_over_the_common_ids(case, student_vocab, teacher_vocab, vocab_size):
    torch.manual_seed(1)
    ws, wt = torch.randn(student_vocab, DIM), torch.randn(teacher_vocab, 12)
    common = vocab_size or min(student_vocab, teacher_vocab)
    hidden, weight = case['hidden'].float().requires_grad_(), ws.clone().requires_grad_()
    found = linear_divergence(hidden, weight, case['other'].float(), wt, Divergence(), vocab_size=vocab_size)
    expected = reference.divergence_of_logits(Divergence(), case['hidden'] @ ws.double().t(), case['other'] @ wt.double().t(), common)
    assert relative(found, expected) < 1e-5
    found.sum().backward()
    assert not weight.grad[common:].any() and weight.grad[:common].any()
    student = (case['hidden'].float() @ ws.t()).requires_grad_()
    dense = logits_divergence(student, case['other'].float() @ wt.t(), Divergence(), vocab_size=vocab_size, reduction='sum')
    dense.backward()
    assert relative(dense, expected.sum()) < 1e-5 and not student.grad[:, common:].any()


# ---- top-k ----


def entries(case, temperature, k=8):
    logprobs = torch.log_softmax(case['other'] @ case['head'].t() / temperature, -1)
    values, ids = logprobs.topk(k)
    values = values.clone()
    values[3, 4:] = -math.inf
    values[4] = -math.inf
    ids[5, 0], ids[6, 1] = VOCAB + 3, -1
    return values, ids


@pytest.mark.parametrize(
    'divergence',
    [
        Divergence(temperature=0.7),
        Divergence(beta=0.2),
        Divergence('forward_kl'),
        Divergence('reverse_kl', temperature=2.0),
        Divergence('skew_reverse_kl'),
        Divergence('tvd'),
    ],
    ids=lambda d: d.kind,
)
@pytest.mark.parametrize('tail', ['bucket', 'renormalize'])
@pytest.mark.parametrize('taken_at', [None, 1.0])
@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-7), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_topk(case, divergence, tail, taken_at, dtype, bound):
    temperature = taken_at or divergence.temperature
    values, ids = entries(case, temperature)
    exact = [case[n].to(dtype).double().clone().requires_grad_() for n in ('hidden', 'weight')]
    expected = reference.divergence_of_buckets(divergence, exact[0] @ exact[1].t(), values, ids, tail, temperature)
    gradients = torch.autograd.grad((case['token_weights'] * expected).sum(), exact)
    for reduction in ('sum', 'none'):
        hidden, weight = (case[n].to(dtype).clone().requires_grad_() for n in ('hidden', 'weight'))
        found = topk_divergence(
            hidden,
            weight,
            values,
            ids,
            divergence,
            tail=tail,
            topk_temperature=taken_at,
            reduction=reduction,
            token_weights=case['token_weights'],
            chunk_tokens=6,
        )
        found.sum().backward()
        assert relative(found.sum(), (case['token_weights'] * expected).sum()) < min(bound, 1e-4)
        assert relative(hidden.grad, gradients[0]) < bound and relative(weight.grad, gradients[1]) < bound


def test_topk_over_the_whole_vocabulary_is_the_full_divergence(case):
    divergence, student, teacher = (
        Divergence(temperature=0.9),
        case['hidden'] @ case['weight'].t(),
        case['other'] @ case['head'][:VOCAB].t(),
    )
    values, ids = torch.log_softmax(teacher / 0.9, -1).topk(VOCAB)
    found = topk_divergence(case['hidden'], case['weight'], values, ids, divergence)
    full = reference.divergence_of_logits(divergence, student, teacher)
    assert torch.allclose(found, full, rtol=1e-6)
    previous = torch.zeros(TOKENS, dtype=torch.float64)
    for k in (1, 4, 32, 200):
        bound = topk_divergence(case['hidden'], case['weight'], values[:, :k], ids[:, :k], divergence)
        assert (bound >= previous - 1e-12).all() and (bound <= full + 1e-12).all()
        previous = bound


@pytest.mark.parametrize('temperature', [0.7, 1.0, 2.5])
@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'tvd'])  # of which the sign of a rounding error is a gradient
def test_topk_of_an_equal_teacher_is_zero_also_when_taken_at_another_temperature(case, kind, temperature):
    hidden, weight = case['hidden'].requires_grad_(), case['weight']
    values, ids = torch.log_softmax(hidden.detach() @ weight.t(), -1).topk(5)
    found = topk_divergence(hidden, weight, values, ids, Divergence(kind, temperature=temperature), topk_temperature=1.0)
    found.sum().backward()
    assert (found >= 0).all() and found.max() < 1e-20 and hidden.grad.abs().max() < 1e-12


@pytest.mark.parametrize('power', [0.4, 1 / 0.9])
@pytest.mark.parametrize(
    'divergence',
    [
        Divergence(temperature=0.9),
        Divergence(beta=0.9),
        Divergence('forward_kl'),
        Divergence('reverse_kl'),
        Divergence('skew_forward_kl'),
        Divergence('skew_forward_kl', skew=0.9),
        Divergence('skew_reverse_kl'),
        Divergence('tvd'),
    ],
    ids=lambda d: f'{d.kind}-{d.beta}-{d.skew}',
)
def test_topk_of_another_temperature_counts_the_least_divergent_tail(case, divergence, power):
    """Of students that are close to the teacher, and of some that are not: within the interval of the tail's mass, and at both ends."""
    taken_at, generator = divergence.temperature * power, torch.Generator().manual_seed(6)
    teacher = case['other'] @ case['head'][:VOCAB].t()
    values, ids = torch.log_softmax(teacher / taken_at, -1).topk(8)
    values[1, 5:] = -math.inf
    ids[2, 0], ids[2, 3] = VOCAB + 3, -1  # which the student lacks
    lifted = torch.tensor([0.0, -4.0, 4.0]).double().repeat(TOKENS)[:TOKENS, None]
    student = teacher + 0.3 * torch.randn(teacher.shape, generator=generator, dtype=torch.float64) + lifted
    student = student.scatter_add(1, ids.clamp(0, VOCAB - 1), -lifted.expand(ids.shape)).requires_grad_()
    at = []
    found = topk_divergence(student, None, values, ids, divergence, topk_temperature=taken_at)
    expected = reference.divergence_of_buckets(divergence, student, values, ids, 'bucket', taken_at, at=at)
    (gradient,), (right,) = (torch.autograd.grad(x.sum(), student) for x in (found, expected))
    assert relative(found, expected) < 1e-8 and relative(gradient, right) < 1e-6
    assert set(at) == {'least', 'largest', 'between'}


def confident(true_tail, others=2000, tokens=64):
    """A teacher [tokens, 6 + others] in float64, with `true_tail` of its mass on the others; its fp32 top 6; the exact tail."""
    generator = torch.Generator().manual_seed(3)
    listed = torch.rand(tokens, 6, generator=generator, dtype=torch.float64) * torch.tensor([1, 1e-2, 1e-3, 1e-4, 1e-4, 1e-4])
    listed = listed / listed.sum(-1, keepdim=True) * (1 - true_tail)
    spread = torch.rand(tokens, others, generator=generator, dtype=torch.float64)
    logits = torch.cat([listed, spread / spread.sum(-1, keepdim=True) * true_tail], -1).log()
    values, ids = logits.float().log_softmax(-1).topk(6)
    rest = logits.scatter(1, ids, -math.inf)
    return logits, values, ids, rest.logsumexp(-1)


@pytest.mark.parametrize('divergence', [Divergence('reverse_kl'), Divergence(beta=1 - 1e-4), Divergence('skew_reverse_kl', skew=1e-6)])
@pytest.mark.parametrize('true_tail', [1e-8, 2.5e-7, 1e-6, 1e-4])
@pytest.mark.parametrize('distance', [0.0, 0.03, 8.0])
def test_topk_tail_of_a_confident_teacher(divergence, true_tail, distance):
    """fp32 log-probabilities that sum to 1 say that there is no tail. The student's is not compared with that: without the tail's
    mass the value stays a lower bound, with it it is right."""
    logits, values, ids, tail = confident(true_tail)
    generator = torch.Generator().manual_seed(4)
    student = logits + distance * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    full = reference.divergence_of_logits(divergence, student, logits)
    x = student.float().requires_grad_()
    found = topk_divergence(x, None, values, ids, divergence)
    found.sum().backward()
    assert (found.double() <= full * (1 + 1e-4) + 1e-7).all()
    assert x.grad.abs().max() < 10
    log_s = torch.log_softmax(student, -1)
    sides = (log_s, logits), (torch.scatter(log_s, 1, ids, -math.inf).logsumexp(-1), tail)
    buckets = [torch.cat([side.gather(1, ids), rest[:, None]], -1) for side, rest in zip(*sides, strict=True)]
    expected = reference.from_log_probs(divergence, *buckets)
    exact = topk_divergence(student.float(), None, values, ids, divergence, tail_logprobs=tail.float())
    assert torch.allclose(exact.double(), expected, rtol=1e-4, atol=1e-6)
    if distance > 1:  # and no loose one
        assert found.double().sum() > 0.5 * expected.sum()


@pytest.mark.parametrize('temperature, lower', [(0.1, 12), (0.5, 60), (1.0, 200)])
@pytest.mark.parametrize(
    'divergence', [Divergence('forward_kl'), Divergence(), Divergence('reverse_kl'), Divergence('tvd')], ids=lambda d: d.kind
)
def test_topk_where_the_students_tail_underflows(case, divergence, temperature, lower):
    """Its share of the whole is below the smallest number; its gradient is not."""
    divergence = dataclasses.replace(divergence, temperature=temperature)
    values, ids = torch.log_softmax(case['other'] @ case['head'][:VOCAB].t() / (4 * temperature), -1).topk(8)
    student = (case['hidden'] @ case['weight'].t()) * 0.01
    student = (student - lower).scatter(1, ids, student.gather(1, ids)).requires_grad_()
    expected = reference.divergence_of_buckets(divergence, student, values, ids, 'bucket', temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    x = student.detach().float().requires_grad_()
    found = topk_divergence(x, None, values, ids, divergence)
    found.sum().backward()
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    assert (x.grad - gradient).norm() < 1e-4 * gradient.norm() + 1e-6  # a TVD may have none


def test_topk_tail_logprobs_and_ids_that_the_student_lacks(case):
    """Such an id is part of the tail also where the tail's mass is given, and a row without entries has no divergence."""
    values, ids = entries(case, 1.0)
    elsewhere = (ids < 0) | (ids >= VOCAB)
    tail = torch.log1p(-values.exp().sum(-1))
    hidden, weight = case['hidden'], case['weight']
    found = topk_divergence(hidden, weight, values, ids, Divergence('reverse_kl'), tail_logprobs=tail)
    assert torch.allclose(found, topk_divergence(hidden, weight, values, ids, Divergence('reverse_kl')), rtol=1e-6)
    assert elsewhere.any() and found[4] == 0
    tail[4] = -math.inf
    assert topk_divergence(hidden, weight, values, ids, Divergence('reverse_kl'), tail_logprobs=tail)[4] == 0


@pytest.mark.parametrize('given', [False, True])
def test_topk_of_every_column(case, given):
    """Neither side has a tail, whatever rounding leaves of the sum of all."""
    values, ids = torch.log_softmax(case['other'] @ case['head'][:VOCAB].t(), -1).topk(VOCAB)
    student = (case['hidden'] @ case['weight'].t()).float().requires_grad_()
    tail = torch.full((TOKENS,), -math.inf) if given else None
    found = topk_divergence(student, None, values.float() - 1e-6, ids, Divergence('forward_kl'), tail_logprobs=tail)
    found.sum().backward()
    exact = student.detach().double().requires_grad_()
    expected = reference.divergence_of_logits(Divergence('forward_kl'), exact, case['other'] @ case['head'][:VOCAB].t())
    expected.sum().backward()
    assert relative(found, expected) < 1e-5 and relative(student.grad, exact.grad) < 1e-4


def test_topk_statistics(case):
    values, ids = entries(case, 1.0)
    stats = TokenStats(detail=True)
    topk_divergence(case['hidden'].float(), case['weight'].float(), values.float(), ids, Divergence(), labels=ids[:, 2], stats=stats)
    log_s = torch.log_softmax(case['hidden'] @ case['weight'].t(), -1)
    present = values.isfinite() & (ids >= 0) & (ids < VOCAB)
    mass = (log_s.gather(1, ids.clamp(0, VOCAB - 1)).exp() * present).sum(-1)
    assert torch.allclose(stats.student_mass_on_topk.double(), mass, atol=1e-6)
    assert torch.allclose(stats.student_entropy.double(), -(log_s.exp() * log_s).sum(-1), atol=1e-5)
    assert torch.allclose(stats.teacher_prob_of_label.double(), values[:, 2].exp() * present[:, 2], atol=1e-6)
    best = values.masked_fill(~present, -math.inf)
    agree = (ids.gather(1, best.argmax(-1, keepdim=True))[:, 0] == log_s.argmax(-1)) & present.any(-1)
    assert torch.equal(stats.top1_agreement.bool(), agree)


# ---- bad input ----


def test_errors_name_both_numbers(case):
    hs, ws, ht, wt = torch.zeros(4, 8), torch.zeros(50, 8), torch.zeros(4, 6), torch.zeros(60, 6)
    d = Divergence()
    for match, call in {
        r'dim 7 against 8': lambda: linear_divergence(hs, torch.zeros(50, 7), ht, wt, d),
        r'dim 8 against 6': lambda: linear_divergence(hs, ws, ht, ws, d),
        r'4 tokens, teacher_hidden 5': lambda: linear_divergence(hs, ws, torch.zeros(5, 6), wt, d),
        r'vocab_size 51 .* at most 50': lambda: linear_divergence(hs, ws, ht, wt, d, vocab_size=51),
        r'vocab_size 0 ': lambda: linear_divergence(hs, ws, ht, wt, d, vocab_size=0),
        r'shape \[4\].*\[3\]': lambda: linear_divergence(hs, ws, ht, wt, d, token_weights=torch.ones(3)),
        r'labels must have shape \[4\]': lambda: linear_divergence(hs, ws, ht, wt, d, labels=torch.ones(4, 1).long()),
        r'without labels': lambda: linear_divergence(hs, ws, ht, wt, d, label_weights=torch.ones(4)),
        r"got 'mean'": lambda: linear_divergence(hs, ws, ht, wt, d, reduction='mean'),
        r'\[49\] entries for a vocabulary of 50': lambda: linear_divergence(hs, ws, ht, wt, d, student_bias=torch.zeros(49)),
        r'student_lora': lambda: linear_divergence(hs, ws, ht, wt, d, student_lora=(torch.zeros(2, 8), torch.zeros(50, 3), 1.0)),
        r'together, or neither': lambda: linear_divergence(hs, ws, ht, None, d),
        r'must be labels': lambda: linear_divergence(hs, ws, None, None, d),
        r'k = 51 is larger than the vocabulary of 50': lambda: topk_divergence(hs, ws, torch.zeros(4, 51), torch.zeros(4, 51).long(), d),
        r'4 tokens, topk_ids 3': lambda: topk_divergence(hs, ws, torch.zeros(3, 5), torch.zeros(3, 5).long(), d),
        r'\[4, 5\] and topk_ids \[4, 6\]': lambda: topk_divergence(hs, ws, torch.zeros(4, 5), torch.zeros(4, 6).long(), d),
        r'tail_logprobs \[4, 1\] .*\[4, 5\]': lambda: topk_divergence(
            hs, ws, torch.zeros(4, 5), torch.zeros(4, 5).long(), d, tail_logprobs=torch.zeros(4, 1)
        ),
        r"got 'drop'": lambda: topk_divergence(hs, ws, torch.zeros(4, 5), torch.zeros(4, 5).long(), d, tail='drop'),
        r'4 tokens, teacher_logits 5': lambda: logits_divergence(torch.zeros(4, 9), torch.zeros(5, 9), d),
        r'chunk_tokens must be at least 1, got 0': lambda: linear_divergence(hs, ws, ht, wt, d, chunk_tokens=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize('refused', [False, True])
def test_large_buffers_are_tensors_like_others(monkeypatch, refused):
    """In huge pages or, where the system refuses them, not."""

    class Refuses(memory.mmap.mmap):
        def madvise(self, advice):
            raise OSError(errno.EINVAL, 'Invalid argument')

    monkeypatch.setattr(memory, '_LARGE', 4096)
    if refused:
        monkeypatch.setattr(memory.mmap, 'mmap', Refuses)
    buffer = memory.empty(3, 1000, dtype=torch.float32, device=torch.device('cpu'))
    buffer.fill_(1)[1].mul_(2)
    kept = io.BytesIO()
    torch.save(buffer[:, :5], kept)
    kept.seek(0)
    assert buffer.sum(1).tolist() == [1000, 2000, 1000]
    assert torch.load(kept).equal(copy.deepcopy(buffer)[:, :5])


@pytest.mark.parametrize('scale', [1e-6, 4e6])
def test_a_scale_beyond_fp16_reaches_the_gradient_of_a_head(scale):
    """Of fp16 hidden states and a bf16 head: what waits for the backward pass is scaled in fp32."""
    waiting, hidden = torch.randn(5, 7).bfloat16(), (torch.randn(5, 3) / 50).half()
    found = products.Found((None, None), waiting, hidden).scaled(torch.tensor(scale), [None, (torch.Size([7, 3]), torch.bfloat16)])
    right = scale * waiting.double().t() @ hidden.double()
    assert (found[1].double() - right).norm() < 1e-2 * right.norm()
