"""The labels' term against float64 and autograd: temperatures, signed weights, importance ratios and their clipping, and what the
log-probabilities of sampled tokens tell of a teacher."""

import divergence_reference as reference
import pytest
import torch
from divergence_reference import relative

from swift_gkd_plugin.divergence import (
    Clipping,
    Divergence,
    LogitTransform,
    TokenStats,
    implementations,
    linear_divergence,
    logits_divergence,
    topk_divergence,
)
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


# ---- importance ratios ----

CLIPPINGS = [
    dict(low=0.2, high=0.2),
    dict(low=0.2, high=0.28),
    dict(low=0.2, high=0.28, delta=1.5),
    dict(low=0.5, high=float('inf'), delta=1.1),
]


def policy_loss(logprobs, old, advantages, low, high, delta=None):
    """ms-swift 4.6.0, swift/rlhf_trainers/grpo_trainer.py, loss_type grpo and dapo at beta 0, of each token."""
    coef_1 = torch.exp(logprobs - old)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    if delta is not None:
        coef_1 = torch.clamp(coef_1, max=delta)
    return -torch.min(coef_1 * advantages, coef_2 * advantages)


def old_policy(entropy, signs):
    """Log-probabilities of labels at which all of the clipping's cases come up, and ratios of exactly one; NaN of two tokens."""
    away = torch.tensor([0.0, 0.6, -0.6, 0.1, -0.1, 0.35, -0.9] * 2, dtype=torch.float64)
    old = -entropy.detach() + away * signs
    old[[0, 8]] = torch.nan
    return old


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-7), (torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('teacher', TEACHERS)
def test_clipping_is_that_of_ms_swift(case, teacher, dtype, bound):
    """Beside a divergence and cross-entropies, in several chunks, at one temperature for all and at several."""
    divergence, seen = Divergence(temperature=0.7), set()
    for number, options in enumerate(CLIPPINGS):
        temperature = (MIXED, 0.7, 1.3)[number % 3]
        for reduction in ('sum', 'none'):
            call, distance, z, x, exact = calls(case, teacher, dtype, divergence)
            weight, labels = case['label_weights'].double(), case['labels']
            entropy = reference.cross_entropy(z, labels, temperature=temperature)
            signs = torch.where(torch.arange(TOKENS) < 7, 1, -1)
            old = old_policy(entropy, signs).to(torch.promote_types(dtype, torch.float32)).double()
            ratio_of = (-entropy).detach().requires_grad_()
            clipped = torch.autograd.grad(policy_loss(ratio_of, old, weight, **options).nansum(), ratio_of)[0] == 0
            clipped &= ~old.isnan() & (labels >= 0)
            term = torch.where(old.isnan(), weight * entropy, policy_loss(-entropy, old.nan_to_num(), weight, **options))
            expected = case['token_weights'] * distance + term * (labels >= 0)
            found = call(
                labels=labels,
                label_weights=case['label_weights'],
                label_temperature=temperature,
                clipping=Clipping(old.to(torch.promote_types(dtype, torch.float32)), **options),
                **weights_of(case, teacher),
                reduction=reduction,
                chunk_tokens=5,
                stats=(stats := TokenStats()),
            )
            at = f'{teacher}, {options}, {reduction}'
            assert relative(found, expected.sum() if reduction == 'sum' else expected) < min(bound, 1e-4), at
            assert torch.equal(stats.clipped, clipped.float()), at
            assert relative(stats.cross_entropy, entropy) < 1e-5, at
            seen |= {(bool(w > 0), bool(c)) for w, c in zip(weight, clipped, strict=True)}
            upstream = torch.linspace(-1, 2, TOKENS) if reduction == 'none' else torch.ones(())  # of any sign
            gradients = torch.autograd.grad((found * upstream).sum(), list(x.values()))
            for name, one, right in zip(x, gradients, torch.autograd.grad((expected * upstream).sum(), list(exact.values())), strict=True):
                assert relative(one, right) < bound, f'{name}, {at}'
    assert len(seen) == 4


def test_the_policy_that_sampled_has_the_gradient_of_the_cross_entropy(case):
    """Of a ratio of one."""
    call, _, z, x, _ = calls(case, 'none', torch.float64, Divergence())
    common = dict(labels=case['labels'], label_weights=case['label_weights'], label_temperature=MIXED)
    plain = call(**common, stats=(stats := TokenStats(detail=False)))
    old = -reference.cross_entropy(z, case['labels'], temperature=MIXED).detach()
    ratios = call(**common, clipping=Clipping(old, 0.2, 0.28))
    assert stats.clipped is None
    assert torch.allclose(ratios, -case['label_weights'].double() * (case['labels'] >= 0))
    for one, right in zip(*(torch.autograd.grad(loss.sum(), list(x.values())) for loss in (ratios, plain)), strict=True):
        assert relative(one, right) < 1e-12


def test_policies_without_anything_in_common(case):
    """A ratio that fp32 has no number for, and one of zero: finite, and no gradient for the advantages that are clipped."""
    call, _, _, x, _ = calls(case, 'two heads', torch.float32, Divergence())
    for old, away in ((-1e4, 1), (1e4, -1)):
        weights = torch.where(torch.arange(TOKENS) < 7, away, 0).float()
        clipping = Clipping(torch.full((TOKENS,), old), 0.2, 0.28)
        loss = call(labels=case['labels'], label_weights=weights, clipping=clipping, token_weights=torch.zeros(TOKENS))
        gradient = torch.autograd.grad(loss.sum(), x['hidden'])[0]
        assert not gradient.any() and torch.allclose(loss, -weights * (1.28 if away > 0 else 0.8) * (case['labels'] >= 0))
        loss = call(labels=case['labels'], label_weights=-weights, clipping=clipping, token_weights=torch.zeros(TOKENS))
        gradient = torch.autograd.grad(loss.sum(), x['hidden'])[0]
        assert loss.isfinite().all() and gradient.isfinite().all() and not loss[7:].any() and not gradient[7:].any()


def test_ratios_are_known_after_the_first_sweep(case, monkeypatch):
    """So all sweeps at once will not do."""

    class AtOnce(Eager):
        def at_once(self, *args):
            raise NotImplementedError

    monkeypatch.setattr(implementations, 'choose', lambda call: AtOnce)
    call, *_ = calls(case, 'two heads', torch.float32, Divergence())
    common = dict(labels=case['labels'], label_weights=case['label_weights'], reduction='sum')
    call(**common, clipping=Clipping(torch.zeros(TOKENS), 0.2, 0.2))
    with pytest.raises(NotImplementedError):
        call(**common)


def test_bad_clippings_are_refused(case):
    old, labels = torch.zeros(TOKENS), case['labels']
    for options, match in (
        (dict(low=-0.1, high=0.2), 'low of a clipping must be >= 0, got -0.1'),
        (dict(low=0.1, high=float('nan')), 'high of a clipping must be >= 0, got nan'),
        (dict(low=0.1, high=0.2, delta=0), 'delta .* got 0'),
    ):
        with pytest.raises(ValueError, match=match):
            Clipping(old, **options)
    call, *_ = calls(case, 'two heads', torch.float32, Divergence())
    with pytest.raises(ValueError, match='needs label_weights'):
        call(labels=labels, clipping=Clipping(old, 0.2, 0.2))
    with pytest.raises(ValueError, match=r'old_logprobs must have shape \[14\]'):
        call(labels=labels, label_weights=old, clipping=Clipping(old[:3], 0.2, 0.2))


def test_ratios_of_whole_responses(case):
    """Given from outside: each token's term has the ratio and the bounds of its response (GSPO-token, arXiv 2507.18071)."""
    responses = torch.arange(TOKENS) // 5
    for options in CLIPPINGS:
        call, _, z, x, exact = calls(case, 'none', torch.float64, Divergence())
        weight, labels = case['label_weights'].double(), case['labels']
        logprobs = -reference.cross_entropy(z, labels, temperature=MIXED)
        old = logprobs.detach() + torch.linspace(-0.5, 0.4, TOKENS, dtype=torch.float64)
        ratios = torch.stack([(logprobs - old)[responses == n].mean() for n in range(3)])[responses].detach()
        # The value is the sequence's, the gradient each token's own.
        expected = policy_loss(logprobs - logprobs.detach() + ratios, 0, weight, **options) * (labels >= 0)
        clipping = Clipping(old, **options, log_ratios=ratios)
        found = call(labels=labels, label_weights=weight, label_temperature=MIXED, clipping=clipping, chunk_tokens=4)
        assert torch.allclose(found, expected)
        gradients = torch.autograd.grad(found.sum(), list(x.values()))
        for one, right in zip(gradients, torch.autograd.grad(expected.sum(), list(exact.values())), strict=True):
            assert relative(one, right) < 1e-9


# ---- a teacher of which nothing is known but the log-probability of the student's token ----


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_the_expected_gradient_is_that_of_the_reverse_kl(case, temperature):
    """Over all tokens that the student may sample, each as often as it is likely to: exactly, and so is the value."""
    divergence = Divergence('reverse_kl', temperature=temperature)
    hidden, other = (case[name][:1].clone() for name in ('hidden', 'other'))
    heads = [case[name].clone() for name in ('weight', 'head')]
    x = [hidden.requires_grad_(), heads[0].requires_grad_()]
    exact = linear_divergence(hidden, heads[0], other, heads[1], divergence).sum()
    right = torch.autograd.grad(exact, x)
    student, teacher = (torch.log_softmax(a @ b.t() / temperature, -1)[0].detach() for a, b in zip((hidden, other), heads, strict=True))
    estimate = linear_divergence(
        hidden.expand(VOCAB, DIM),
        heads[0],
        None,
        None,
        divergence,
        labels=torch.arange(VOCAB),
        label_temperature=temperature,
        teacher_logprobs=teacher,
        token_weights=student.exp(),
        reduction='sum',
        chunk_tokens=64,
    )
    assert torch.allclose(estimate, exact, rtol=1e-12)
    for one, expected in zip(torch.autograd.grad(estimate, x), right, strict=True):
        assert relative(one, expected) < 1e-12


@pytest.mark.parametrize('dtype, bound', [(torch.float64, 1e-7), (torch.float32, 3e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_the_estimate_of_one_token(case, dtype, bound, reduction):
    """Beside a cross-entropy and clipped ratios, in chunks; tokens of which the teacher has said nothing have none."""
    wide = torch.promote_types(dtype, torch.float32)
    for temperature in (1.0, 0.7, MIXED):
        call, _, z, x, exact = calls(case, 'none', dtype, Divergence('reverse_kl', temperature=0.7))
        labels, known = case['labels'], torch.linspace(-9, -1, TOKENS, dtype=torch.float64)
        known[4] = torch.nan
        logprobs = -reference.cross_entropy(z, labels, temperature=temperature)
        old = torch.where(torch.arange(TOKENS) < 6, logprobs.detach() + 0.1, torch.nan).to(wide)
        told, counts = (labels >= 0) & ~known.isnan(), (labels >= 0).double()
        ahead = torch.where(told, logprobs.detach() - known, 0)
        advantages, of_estimate = case['label_weights'].double(), case['token_weights'].double() * old.isnan()
        clipped = policy_loss(logprobs, old.nan_to_num().double(), advantages, 0.2, 0.2)
        others = torch.where(old.isnan(), -advantages * logprobs, clipped) * counts
        found = call(
            labels=labels,
            label_weights=case['label_weights'],
            label_temperature=temperature,
            teacher_logprobs=known.to(wide),
            token_weights=case['token_weights'] * old.isnan(),
            clipping=Clipping(old, 0.2, 0.2),
            reduction=reduction,
            chunk_tokens=5,
            stats=(stats := TokenStats()),
        )
        expected = (of_estimate * ahead + others).detach()
        assert relative(found, expected.sum() if reduction == 'sum' else expected) < min(bound, 1e-4)
        assert relative(stats.divergence, ahead) < 1e-5
        right = torch.autograd.grad((of_estimate * ahead * logprobs + others).sum(), list(exact.values()))
        for name, one, wanted in zip(x, torch.autograd.grad(found.sum(), list(x.values())), right, strict=True):
            assert relative(one, wanted) < bound, (name, temperature)


def test_what_a_sampled_teacher_cannot_be_beside(case):
    call, *_ = calls(case, 'two heads', torch.float32, Divergence())
    with pytest.raises(ValueError, match='another one was given beside them'):
        call(labels=case['labels'], teacher_logprobs=torch.zeros(TOKENS))
    call, *_ = calls(case, 'none', torch.float32, Divergence())
    with pytest.raises(ValueError, match=r'teacher_logprobs must have shape \[14\]'):
        call(labels=case['labels'], teacher_logprobs=torch.zeros(3))


@pytest.mark.parametrize('trained', [True, False])
@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_clipping_leaves_the_estimate_alone(case, reduction, trained):
    """A token may have both: a clipped ratio, and an estimate whose gradient no ratio multiplies."""
    hidden, weight = case['hidden'].clone().requires_grad_(), case['weight'].clone().requires_grad_(trained)
    labels, known = case['labels'], torch.linspace(-9, -1, TOKENS, dtype=torch.float64)
    logprobs = -reference.cross_entropy(hidden @ weight.t(), labels)
    old = logprobs.detach() + torch.linspace(-0.5, 0.5, TOKENS, dtype=torch.float64)
    advantages, weights, counts = case['label_weights'].double(), case['token_weights'].double(), (labels >= 0).double()
    ratio = (logprobs - old).exp()
    right = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + weights * (logprobs.detach() - known) * logprobs
    loss = linear_divergence(
        hidden,
        weight,
        None,
        None,
        Divergence('reverse_kl'),
        labels=labels,
        label_weights=advantages,
        clipping=Clipping(old, 0.2, 0.2),
        token_weights=weights,
        teacher_logprobs=known,
        reduction=reduction,
    )
    wanted = [hidden, weight] if trained else [hidden]
    expected = torch.autograd.grad((right * counts).sum(), wanted)
    for found, one in zip(torch.autograd.grad(loss.sum(), wanted), expected, strict=True):
        assert relative(found, one) < 1e-7


def test_a_token_that_the_teacher_rules_out_is_seen():
    """Of a loss that is infinite nothing is learnt; the largest number of fp32 would pass for one that can be."""
    z, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss = logits_divergence(z, None, Divergence('reverse_kl'), labels=labels, teacher_logprobs=torch.tensor([-1.0, -torch.inf, torch.nan]))
    assert loss[1] == torch.inf and loss[[0, 2]].isfinite().all()
