"""The labels' term against float64 and autograd: temperatures, signed weights."""

import divergence_reference as reference
import pytest
import torch
from divergence_reference import relative

from swift_gkd_plugin.divergence import Divergence, LogitTransform, TokenStats, linear_divergence, logits_divergence, topk_divergence
from swift_gkd_plugin.divergence._eager import Eager

TOKENS, DIM, VOCAB, K = 14, 16, 300, 8
# Imitated tokens at 1, sampled ones at other temperatures, the divergence's own among them.
MIXED = torch.tensor([1.0, 0.7, 0.1, 4.0, 1.0, 0.3, 2.0] * 2)
TEMPERATURES = (0.7, 1.0, 0.1, 4.0, MIXED)
SOFTCAP = LogitTransform(scale=1.5, softcap=6.0)
TEACHERS = ['two heads', 'one head', 'bucket', 'renormalize', 'none', 'ready', 'ready, top-k']


@pytest.fixture
def case():
    torch.manual_seed(0)
    double = dict(dtype=torch.float64)
    return {
        'hidden': torch.randn(TOKENS, DIM, **double),
        'weight': torch.randn(VOCAB, DIM, **double) * 0.5,
        'bias': torch.randn(VOCAB, **double),
        'a': torch.randn(3, DIM, **double),
        'b': torch.randn(VOCAB, 3, **double) * 0.1,
        'other': torch.randn(TOKENS, DIM, **double),
        'head': torch.randn(VOCAB, DIM, **double) * 0.5,
        'labels': torch.where(torch.arange(TOKENS) == 3, -100, torch.randint(VOCAB, (TOKENS,))),
        'token_weights': torch.rand(TOKENS),
        'label_weights': torch.randn(TOKENS),
    }


def calls(case, teacher, dtype, divergence):
    """(operator, divergence in float64, logits in float64, tensors that have a gradient, and those in float64)."""
    plain = teacher in ('one head', 'ready', 'ready, top-k', 'renormalize')
    names = ('hidden', 'weight') if plain else ('hidden', 'weight', 'bias', 'a', 'b')
    x = {name: case[name].to(dtype).requires_grad_() for name in names}
    exact = {name: x[name].detach().double().requires_grad_() for name in names}
    lora = None if plain else (exact['a'], exact['b'], 0.5)
    transform = None if plain else SOFTCAP
    z = reference.logits(exact['hidden'], exact['weight'], exact.get('bias'), lora, transform)
    extra = {} if plain else dict(student_bias=x['bias'], student_lora=(x['a'], x['b'], 0.5), student_transform=SOFTCAP)
    heads = x['hidden'], x['weight']
    other, head = case['other'].to(dtype), case['head'].to(dtype)
    if teacher.startswith('ready'):
        ready = z.detach().to(dtype).requires_grad_()
        x, heads, z = {'logits': ready}, (ready, None), ready.detach().double().requires_grad_()
        exact = {'logits': z}
    teacher_logits = other.double() @ (exact['weight'].detach() if teacher == 'one head' else head.double()).t()
    if teacher in ('bucket', 'renormalize', 'ready, top-k'):
        tail = 'renormalize' if teacher == 'renormalize' else 'bucket'
        values, ids = torch.log_softmax(teacher_logits / divergence.temperature, -1).topk(K)
        ids[5, 2], ids[6, 1] = case['labels'][5], -1
        distance = reference.divergence_of_buckets(divergence, z, values, ids, tail, divergence.temperature)
        return lambda **more: topk_divergence(*heads, values, ids, divergence, tail=tail, **extra, **more), distance, z, x, exact
    if teacher == 'none':
        return lambda **more: linear_divergence(*heads, None, None, divergence, **extra, **more), 0, z, x, exact
    if teacher == 'ready':
        teacher_logits = teacher_logits.to(dtype)
    distance = reference.divergence_of_logits(divergence, z, teacher_logits.double())
    if teacher == 'ready':
        return lambda **more: logits_divergence(ready, teacher_logits, divergence, **more), distance, z, x, exact
    head = x['weight'].detach() if teacher == 'one head' else head
    return lambda **more: linear_divergence(*heads, other, head, divergence, **extra, **more), distance, z, x, exact


def weights_of(case, teacher):
    return {} if teacher == 'none' else {'token_weights': case['token_weights']}


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-7), (torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('teacher', TEACHERS)
def test_temperatures_and_signed_weights(case, teacher, dtype, bound):
    for number, temperature in enumerate(TEMPERATURES):
        divergence = Divergence(('jsd', 'reverse_kl', 'forward_kl')[number % 3], temperature=0.7)
        for reduction in ('sum', 'none'):
            call, distance, z, x, exact = calls(case, teacher, dtype, divergence)
            entropy = reference.cross_entropy(z, case['labels'], temperature=temperature)
            expected = case['token_weights'] * distance + case['label_weights'] * entropy
            labels = dict(labels=case['labels'], label_weights=case['label_weights'], label_temperature=temperature)
            loss = call(**labels, **weights_of(case, teacher), reduction=reduction, chunk_tokens=5, stats=(stats := TokenStats()))
            at = f'{teacher} at {temperature}, {reduction}'
            assert relative(loss, expected.sum() if reduction == 'sum' else expected) < min(bound, 1e-4), at
            assert relative(stats.cross_entropy, entropy) < 1e-5, at
            found = torch.autograd.grad(loss.sum(), list(x.values()))
            for name, one, right in zip(x, found, torch.autograd.grad(expected.sum(), list(exact.values())), strict=True):
                assert one.dtype == dtype and relative(one, right) < bound, f'{name}, {at}'


def test_of_the_statistics_alone(case):
    """Without a weight, beside a teacher."""
    call, distance, z, *_ = calls(case, 'bucket', torch.float32, Divergence(temperature=0.7))
    loss = call(labels=case['labels'], label_temperature=MIXED, stats=(stats := TokenStats(detail=True)))
    assert relative(loss, distance) < 1e-5
    assert relative(stats.cross_entropy, reference.cross_entropy(z, case['labels'], temperature=MIXED)) < 1e-5


@pytest.mark.parametrize('teacher', TEACHERS)
def test_a_label_temperature_that_is_the_divergences_own_takes_no_sum_of_its_own(case, teacher, monkeypatch):
    call, *_ = calls(case, teacher, torch.float32, Divergence(temperature=0.7))
    labels = dict(labels=case['labels'], label_weights=case['label_weights'])
    right = call(**labels, label_temperature=torch.full((TOKENS,), 0.7))
    monkeypatch.delattr(Eager, '_normalise_for_labels')
    assert torch.allclose(call(**labels, label_temperature=0.7), right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('teacher', TEACHERS)
def test_a_weight_of_zero_has_no_gradient_at_all(case, teacher):
    """Nor has a token without a label: of the hidden states, or of ready logits, rows of zeros."""
    call, _, _, x, _ = calls(case, teacher, torch.float32, Divergence(temperature=0.7))
    weights = case['label_weights'] * (torch.arange(TOKENS) % 2)
    nothing = (weights == 0) | (case['labels'] < 0)
    loss = call(labels=case['labels'], label_weights=weights, label_temperature=MIXED, token_weights=torch.zeros(TOKENS))
    gradient = torch.autograd.grad(loss.sum(), next(iter(x.values())))[0]
    assert not loss[nothing].any() and not gradient[nothing].any()
    assert loss[~nothing].all() and gradient[~nothing].any(-1).all()


def test_any_logits_at_any_two_temperatures():
    """One column 1e-7 to 1e30 above or below the others, one masked: as right as fp32 logits over the temperature are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([7, 0, 7, 11, 59])
    for number in range(80):
        student = torch.randn(5, 60, generator=generator)
        student[:, 7] += (1 if number % 2 else -1) * 10 ** float(torch.rand((), generator=generator) * 37 - 7)
        student[:, 3] = -torch.inf
        divergence = Divergence(temperature=0.1 * 40 ** float(torch.rand((), generator=generator)))
        temperature = 0.1 * 40 ** torch.rand(5, generator=generator)
        weights, x = torch.randn(5, generator=generator), student.clone().requires_grad_()
        exact = student.double().requires_grad_()
        found = logits_divergence(x, None, divergence, labels=labels, label_weights=weights, label_temperature=temperature)
        expected = weights * reference.cross_entropy(exact, labels, temperature=temperature)
        found.sum().backward()
        expected.sum().backward()
        rounding = 4e-7 * (5 + student.masked_fill(student == -torch.inf, 0).abs().amax(-1)) / temperature
        assert ((found - expected).abs() <= 1e-5 * expected.abs() + weights.abs() * rounding).all(), (number, found, expected)
        off, bound = (x.grad - exact.grad).norm(dim=-1), 2 * weights.abs() / temperature * torch.expm1(rounding.clamp(max=50))
        assert x.grad.isfinite().all() and (off <= 1e-5 * exact.grad.norm(dim=-1) + bound).all(), (number, off)


@pytest.mark.parametrize(
    'bad, match', [(0, 'finite, got 0'), (float('inf'), 'got inf'), (float('nan'), 'got nan'), (torch.ones(3), r'shape \[14\]')]
)
def test_bad_temperatures_are_refused(case, bad, match):
    call, *_ = calls(case, 'two heads', torch.float32, Divergence())
    with pytest.raises(ValueError, match=f'label_temperature must .*{match}'):
        call(labels=case['labels'], label_temperature=bad)
