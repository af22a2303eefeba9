"""The divergences against their definitions in float64, and what must hold of them whatever the numbers."""

import math

import divergence_reference as reference
import pytest
import torch
from divergence_reference import relative
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swift_gkd_plugin.divergence import Divergence, TokenStats, linear_divergence, logits_divergence, topk_divergence
from swift_gkd_plugin.divergence.kinds import KINDS, MAX_LOG_RATIO

DIVERGENCES = [
    Divergence('jsd', 0.5),
    Divergence('jsd', 0.1, temperature=0.7),
    Divergence('jsd', 0.9, temperature=1.5),
    Divergence('jsd', 0.0),
    Divergence('jsd', 1.0),
    Divergence('forward_kl', temperature=0.9),
    Divergence('reverse_kl', temperature=2.0),
    Divergence('skew_forward_kl', skew=0.1),
    Divergence('skew_forward_kl', skew=0.5),
    Divergence('skew_forward_kl', skew=0.95),
    Divergence('skew_reverse_kl', skew=0.1),
    Divergence('skew_reverse_kl', skew=0.7),
    Divergence('skew_reverse_kl', skew=0.9),
    Divergence('skew_reverse_kl', skew=0.0),
    Divergence('tvd', temperature=0.9),
]


def by_name(divergence):
    return f'{divergence.kind}-{divergence.beta}-{divergence.skew}'


@pytest.mark.parametrize('divergence', DIVERGENCES, ids=by_name)
@pytest.mark.parametrize('spread', [0.01, 1.0, 30.0])
def test_value_and_gradient_are_the_definitions(divergence, spread):
    torch.manual_seed(0)
    student = (torch.randn(9, 200, dtype=torch.float64) * spread).requires_grad_()
    teacher = torch.randn(9, 200, dtype=torch.float64) * spread
    weights = torch.rand(9, dtype=torch.float64)
    expected = reference.divergence_of_logits(divergence, student, teacher)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), student)
    found = logits_divergence(student, teacher, divergence)
    (found_gradient,) = torch.autograd.grad((weights * found).sum(), student)
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-14)
    # Where the two have nothing in common a gradient all but vanishes, as a difference of equal numbers in both
    # computations.
    assert (found_gradient - gradient).norm() < 1e-9 * gradient.norm() + 1e-14


@pytest.mark.parametrize('divergence', DIVERGENCES, ids=by_name)
def test_gradcheck(divergence):
    torch.manual_seed(1)
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    other, head = torch.randn(3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_divergence(h, w, other, head, divergence), (hidden, weight))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('divergence', DIVERGENCES, ids=by_name)
def test_equal_distributions_are_exactly_zero(divergence, dtype):
    torch.manual_seed(2)
    hidden = torch.randn(5, 16).to(dtype).requires_grad_()
    weight = torch.randn(301, 16).to(dtype).requires_grad_()
    found = linear_divergence(hidden, weight, hidden.detach().clone(), weight.detach().clone(), divergence)
    found.sum().backward()
    assert not found.any() and not hidden.grad.any() and not weight.grad.any()


@given(
    kind=st.sampled_from(['jsd', 'forward_kl', 'reverse_kl', 'skew_forward_kl', 'skew_reverse_kl', 'tvd']),
    beta=st.floats(0, 1),
    skew=st.just(0.0) | st.floats(1e-6, 1 - 1e-6),
    temperature=st.floats(0.2, 5),
    seed=st.integers(0, 2**20),
    log_spread=st.floats(-3, 2),
    log_distance=st.floats(-9, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    vocab=st.integers(1, 300),
    chunk=st.integers(1, 9),
)
@example('jsd', 1e-9, 0.0, 1.0, 0, 1.0, 1.0, torch.float32, 2, 1)
@settings(max_examples=150, deadline=None)
def test_never_negative_and_finite(kind, beta, skew, temperature, seed, log_spread, log_distance, dtype, vocab, chunk):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(6, vocab, generator=generator) * 10**log_spread
    teacher = student + torch.randn(6, vocab, generator=generator) * 10**log_distance
    student = student.to(dtype).requires_grad_()
    found = logits_divergence(student, teacher.to(dtype), Divergence(kind, beta, temperature, skew), chunk_tokens=chunk)
    found.sum().backward()
    assert (found >= 0).all() and found.isfinite().all() and student.grad.isfinite().all()


@given(
    seed=st.integers(0, 2**20),
    vocab=st.integers(2, 500),
    tokens=st.integers(1, 12),
    dim=st.integers(1, 24),
    chunk=st.integers(1, 13),
    beta=st.floats(0.01, 0.99),
    temperature=st.floats(0.3, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_partition_against_the_definition(seed, vocab, tokens, dim, chunk, beta, temperature, dtype):
    generator = torch.Generator().manual_seed(seed)
    hs, ht = (torch.randn(tokens, dim, generator=generator).to(dtype) for _ in range(2))
    ws, wt = (torch.randn(vocab, dim, generator=generator).to(dtype) for _ in range(2))
    divergence = Divergence('jsd', beta, temperature)
    expected = reference.divergence_of_logits(divergence, hs.double() @ ws.double().t(), ht.double() @ wt.double().t())
    found = linear_divergence(hs, ws, ht, wt, divergence, chunk_tokens=chunk)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)


def test_symmetry_and_exchange():
    torch.manual_seed(3)
    a, b = torch.randn(2, 8, 500, dtype=torch.float64) * 3
    assert torch.allclose(logits_divergence(a, b, Divergence()), logits_divergence(b, a, Divergence()), rtol=1e-12)
    assert torch.allclose(logits_divergence(a, b, Divergence(beta=0.2)), logits_divergence(b, a, Divergence(beta=0.8)), rtol=1e-12)
    assert torch.allclose(logits_divergence(a, b, Divergence('forward_kl')), logits_divergence(b, a, Divergence('reverse_kl')))
    assert (logits_divergence(a, b, Divergence()) <= math.log(2)).all()
    assert (logits_divergence(a, b, Divergence('tvd')) <= 1).all()


def test_beta_zero_and_one_are_the_plain_kls():
    torch.manual_seed(4)
    a, b = torch.randn(2, 8, 500)
    assert torch.equal(logits_divergence(a, b, Divergence(beta=0)), logits_divergence(a, b, Divergence('forward_kl')))
    assert torch.equal(logits_divergence(a, b, Divergence(beta=1)), logits_divergence(a, b, Divergence('reverse_kl')))


# ---- two models that are close: the case of self-distillation ----


def models_at(divergence, distance, tokens, dim, vocab, spread):
    """Hidden states of two models that share a head, `distance` nats apart in the mean."""
    torch.manual_seed(5)
    hidden, weight, direction = torch.randn(tokens, dim), torch.randn(vocab, dim) * spread, torch.randn(tokens, dim)
    low, high = 1e-6, 30.0
    for _ in range(25):
        step = math.sqrt(low * high)
        value = reference.divergence_of_logits(divergence, hidden @ weight.t(), (hidden + step * direction) @ weight.t())
        low, high = (step, high) if value.mean() < distance else (low, step)
    return hidden, hidden + step * direction, weight


CLOSE = [
    Divergence('jsd', 0.5),
    Divergence('jsd', 0.1),
    Divergence('forward_kl'),
    Divergence('reverse_kl'),
    Divergence('skew_forward_kl'),
    Divergence('skew_reverse_kl'),
]
DISTANCES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5]


@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('divergence', CLOSE, ids=by_name)
def test_accuracy_from_fp32_logits(divergence, distance):
    """On exactly the same fp32 logits: every token within max(2e-5·D, 1e-9), the gradient within 1e-5."""
    distance = min(distance, 0.2) if divergence.kind in ('jsd', 'skew_forward_kl', 'skew_reverse_kl') else distance
    hs, ht, weight = models_at(divergence, distance, 32, 64, 4096, 0.4)
    student, teacher = hs @ weight.t(), ht @ weight.t()
    exact = student.double().requires_grad_()
    expected = reference.divergence_of_logits(divergence, exact, teacher.double())
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    student.requires_grad_()
    found = logits_divergence(student, teacher, divergence)
    (found_gradient,) = torch.autograd.grad(found.sum(), student)
    error = (found.double() - expected).detach()
    assert error.mean().abs() <= max(1e-5 * expected.mean(), 1e-9)
    assert (error.abs() <= torch.clamp(2e-5 * expected.mean(), min=1e-9)).all()
    assert relative(found_gradient, gradient) < 1e-5


@pytest.mark.parametrize(('dtype', 'one_head'), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize('distance', DISTANCES)
@pytest.mark.parametrize('divergence', CLOSE, ids=by_name)
def test_accuracy_from_hidden_states(divergence, distance, dtype, one_head):
    """fp32: mean within max(1e-5·D, 1e-8). bf16: mean within max(5e-4·D, 1e-7), a token within max(5e-3·D, 1e-6).

    Gradients: bf16 within 0.5 %, fp32 within 1e-5 where both models have one head. With two heads the products that make
    the logits are rounded at 1e-7 of a logit, and that limits the gradient to about 1e-6 of a logit over the typical
    log-ratio sqrt(8·D).
    """
    distance = min(distance, 0.2) if divergence.kind in ('jsd', 'skew_forward_kl', 'skew_reverse_kl') else distance
    hs, ht, weight = models_at(divergence, distance, 32, 64, 4096, 0.4)
    hs, ht, weight = (x.to(dtype).requires_grad_() for x in (hs, ht, weight))
    if dtype == torch.bfloat16 and distance < 1e-2:  # hidden states this close are equal in bf16: the heads differ instead
        ht, other = hs.detach(), (weight + (distance**0.5) * 0.5 * 0.4 * torch.randn(weight.shape)).to(dtype).detach()
    else:
        other = weight.detach() if one_head else weight.detach().clone()
    exact = [x.detach().double().requires_grad_() for x in (hs, weight)]
    expected = reference.divergence_of_logits(divergence, exact[0] @ exact[1].t(), ht.detach().double() @ other.double().t())
    gradients = torch.autograd.grad(expected.sum(), exact)
    found = linear_divergence(hs, weight, ht, other, divergence)
    error, mean = (found.double() - expected).detach(), float(expected.detach().mean())
    if dtype == torch.float32:
        assert abs(error.mean()) <= max(1e-5 * mean, 1e-8)
    else:
        assert abs(error.mean()) <= max(5e-4 * mean, 1e-7)
        assert (error.abs() <= torch.clamp(5e-3 * expected, min=1e-6)).all()
    bound = 5e-3 if dtype == torch.bfloat16 else 1e-5 if one_head else max(1e-5, 3e-6 / math.sqrt(mean))
    total = linear_divergence(hs, weight, ht, other, divergence, reduction='sum')
    for one, two, right in zip(
        torch.autograd.grad(total, (hs, weight)), torch.autograd.grad(found.sum(), (hs, weight)), gradients, strict=True
    ):
        assert relative(one, right) < bound and relative(two, right) < bound


@pytest.mark.parametrize('spread', [0.3, 2.0, 8.0])
@pytest.mark.parametrize(
    'divergence',
    [Divergence(beta=beta) for beta in (1e-6, 1e-5, 1e-3, 0.03, 0.97, 1 - 1e-3, 1 - 1e-5, 1 - 1e-6)]
    + [
        Divergence(kind, skew=skew)
        for kind in ('skew_forward_kl', 'skew_reverse_kl')
        for skew in (1e-6, 1e-4, 1e-2, 0.87, 0.88, 0.99, 0.999, 1 - 1e-4, 1 - 1e-6)
    ],
    ids=by_name,
)
def test_mixtures_with_a_small_weight(divergence, spread):
    """Nothing cancels where the mixture is all but one of the two, for which a weight of 1e-6 is all that is left."""
    torch.manual_seed(8)
    student = (torch.randn(32, 2000) * spread).requires_grad_()
    teacher = torch.randn(32, 2000) * spread
    same = student.detach().double().requires_grad_()
    expected = exact(divergence, same, teacher.double())
    (gradient,) = torch.autograd.grad(expected.sum(), same)
    found = logits_divergence(student, teacher, divergence)
    (found_gradient,) = torch.autograd.grad(found.sum(), student)
    assert relative(found, expected) < 1e-5
    assert relative(found_gradient, gradient) < 1e-5


# ---- anything that two models may say, against float64 ----


def exact_kl(log_p, log_q):
    """KL(p‖q) with the limit that the operator sets to a log-ratio; q - p, whose sum is 0, is added to each column, without which
    float64 too would lose a KL of 1e-13."""
    log_ratio = (log_q - log_p).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    little, p = log_ratio.clamp(max=1), log_p.exp()
    return torch.where(log_ratio < 1, p * (little.expm1() - little), log_q.exp() - p - p * log_ratio).sum(-1)


def exact(divergence, student, teacher):
    """The definition in float64, logits of -inf and log-ratios of any size included."""
    log_s, log_t = (torch.log_softmax(z.clamp_min(-1e30) / divergence.temperature, -1) for z in (student, teacher))
    kind, w = divergence.form
    if kind == 'tvd':
        return (log_s.exp() - log_t.exp()).abs().sum(-1) / 2
    if kind == 'forward_kl':
        return exact_kl(log_t, log_s)
    if kind == 'reverse_kl':
        return exact_kl(log_s, log_t)
    log_m = torch.logaddexp(log_t + math.log(w), log_s + math.log1p(-w))
    if kind == 'jsd':
        return w * exact_kl(log_t, log_m) + (1 - w) * exact_kl(log_s, log_m)
    return exact_kl(log_t if kind == 'skew_forward_kl' else log_s, log_m)


WEIGHTS = st.sampled_from([1e-6, 1e-5, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-3, 1 - 1e-5, 1 - 1e-6]) | st.floats(1e-6, 1 - 1e-6)
MODELS = dict(
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from([0.0, 1.0]) | WEIGHTS,
    skew=st.just(0.0) | WEIGHTS,
    temperature=st.floats(0.1, 4),
    seed=st.integers(0, 2**20),
    log_gap=st.floats(-7, 30),
)


@given(**MODELS, masked=st.sampled_from(['none', 'student', 'teacher', 'both']))
@settings(max_examples=200, deadline=None)
def test_any_two_models(kind, beta, skew, temperature, seed, log_gap, masked):
    """Value and gradient from fp32 logits that differ by 1e-7 to 1e30 in one column, a little or a lot in the others."""
    generator = torch.Generator().manual_seed(seed)
    divergence = Divergence(kind, beta, temperature, skew)
    student = torch.randn(4, 40, generator=generator)
    teacher = student + torch.randn(4, 40, generator=generator) * torch.tensor([[0.0], [1e-3], [0.1], [3.0]])
    teacher[:, 7] = student[:, 7] + (1 if seed % 2 else -1) * 10**log_gap
    for side in (student, teacher):
        if masked in ('both', 'student' if side is student else 'teacher'):
            side[:, 3] = -math.inf
    x, y = student.clone().requires_grad_(), student.double().clamp_min(-1e30).requires_grad_()
    found, expected = logits_divergence(x, teacher, divergence), exact(divergence, y, teacher.double())
    (gradient,), (right,) = (torch.autograd.grad(d.sum(), z) for d, z in ((found, x), (expected, y)))
    reference.assert_as_exact(divergence, (student, teacher), (found, gradient), (expected, right))


def teacher_with_a_tail(seed, k, log_tail, roughness, columns=200):
    """Probabilities [4, k + columns] in fp64, of which all but the first k are 10**log_tail, evenly spread or not; the generator."""
    generator = torch.Generator().manual_seed(seed)
    listed = torch.rand(4, k, generator=generator, dtype=torch.float64)
    rest = (roughness * torch.randn(4, columns, generator=generator, dtype=torch.float64)).softmax(-1)
    tail = 10**log_tail * 0.999
    return torch.cat([listed / listed.sum(-1, keepdim=True) * (1 - tail), rest * tail], -1), generator


TAILS = dict(
    k=st.integers(1, 12),
    log_tail=st.floats(-12, 0),
    given_tail=st.booleans(),
    power=st.just(1.0) | st.floats(0.3, 3),  # the temperature of the log-probabilities over the divergence's
    roughness=st.sampled_from([0.0, 0.3, 6.0]),
)


@given(**MODELS, **TAILS)
@settings(max_examples=300, deadline=None)
def test_top_k_is_never_above_the_whole(kind, beta, skew, temperature, seed, log_gap, k, log_tail, given_tail, power, roughness):
    """Whatever the teacher's tail, whether fp32 lets it be seen or not, and whatever temperature it was looked at."""
    divergence, taken_at = Divergence(kind, beta, temperature, skew), temperature * power
    probabilities, generator = teacher_with_a_tail(seed, k, log_tail, roughness)
    teacher = probabilities.log() * taken_at
    student = (teacher + torch.randn(4, k + 200, generator=generator) * torch.tensor([[0.0], [1e-3], [1.0], [10.0]])).float()
    student[:, 1] += min(10**log_gap, 1e30)
    log_t = torch.log_softmax(teacher.float() / taken_at, -1)
    values, ids = log_t.topk(k)
    tails = log_t.double().scatter(1, ids, -math.inf).logsumexp(-1) if given_tail else None
    x, stats = student.requires_grad_(), TokenStats(detail=True)
    found = topk_divergence(x, None, values, ids, divergence, topk_temperature=taken_at, tail_logprobs=tails, stats=stats, labels=ids[:, 0])
    found.sum().backward()
    student = student.detach().double()
    whole = exact(divergence, student, teacher)
    assert (found >= 0).all() and found.isfinite().all() and x.grad.isfinite().all()
    assert (found <= whole * (1 + 1e-4) + 2e-6).all()
    for name in ('forward_kl', 'reverse_kl'):
        whole = exact(Divergence(name, temperature=temperature), student, teacher)
        assert (getattr(stats, name) <= whole * (1 + 1e-4) + 2e-6).all(), name
    log_t = torch.log_softmax(teacher / temperature, -1)
    assert (stats.teacher_entropy <= -(log_t.exp() * log_t).sum(-1) * (1 + 1e-4) + 1e-4).all()
    assert (stats.teacher_prob_of_label <= log_t.gather(1, ids[:, :1])[:, 0].exp() * (1 + 1e-4)).all()


@given(**{name: one for name, one in MODELS.items() if name != 'log_gap'}, **TAILS, columns=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_top_k_of_any_temperature_in_float64(kind, beta, skew, temperature, seed, k, log_tail, given_tail, power, roughness, columns):
    """No more than the whole, to rounding; nothing for a student that is the teacher; and the gradient of just that value."""
    divergence, taken_at = Divergence(kind, beta, temperature, skew), temperature * power
    probabilities, generator = teacher_with_a_tail(seed, k, log_tail, roughness, columns)
    teacher = probabilities.log() * taken_at
    away, direction = torch.randn(2, *teacher.shape, generator=generator, dtype=torch.float64) * temperature
    student = teacher + away * torch.tensor([[0.0], [0.03], [1.0], [10.0]])
    log_t = torch.log_softmax(teacher / taken_at, -1)
    values, ids = log_t.topk(k)
    tails = log_t.scatter(1, ids, -math.inf).logsumexp(-1) if given_tail else None

    def value(x):
        return topk_divergence(x, None, values, ids, divergence, topk_temperature=taken_at, tail_logprobs=tails)

    x = student.requires_grad_()
    found = value(x)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert (found <= exact(divergence, x.detach(), teacher) * (1 + 1e-9) + 1e-12).all()
    assert found[0] < 1e-12
    # A TVD has kinks, and the others' second derivative jumps where the tail's mass leaves an end of its interval.
    step = 1e-5 * direction
    with torch.no_grad():
        slope = (value(x + step) - value(x - step)) / 2e-5
    off = (slope - (gradient * direction).sum(-1)).abs()[2:]
    allowed = 2e-3 * (gradient.norm(dim=-1) * direction.norm(dim=-1))[2:] + 1e-8
    assert kind == 'tvd' or (off <= allowed).all(), (off, allowed)


# ---- columns of -inf ----


@pytest.mark.parametrize('divergence', DIVERGENCES, ids=by_name)
def test_columns_masked_on_both_sides_do_not_count(divergence):
    torch.manual_seed(6)
    student, teacher = torch.randn(2, 5, 60)
    masked_s, masked_t = student.clone(), teacher.clone()
    masked_s[:, 40:], masked_t[:, 40:] = -math.inf, -math.inf
    masked_s.requires_grad_()
    found = logits_divergence(masked_s, masked_t, divergence)
    found.sum().backward()
    assert torch.allclose(found, logits_divergence(student[:, :40], teacher[:, :40], divergence), rtol=1e-5)
    assert masked_s.grad.isfinite().all() and not masked_s.grad[:, 40:].any()


@pytest.mark.parametrize('divergence', DIVERGENCES, ids=by_name)
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_columns_masked_on_one_side_are_finite(divergence, side):
    torch.manual_seed(7)
    student, teacher = torch.randn(2, 5, 60)
    (student if side == 'student' else teacher)[:, 5] = -math.inf
    student.requires_grad_()
    found = logits_divergence(student, teacher, divergence)
    found.sum().backward()
    assert found.isfinite().all() and (found > 0).all() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    'bad',
    [
        dict(kind='kl'),
        dict(beta=1.1),
        dict(beta=-0.1),
        dict(temperature=0),
        dict(temperature=-1),
        dict(temperature=math.inf),
        dict(skew=1),
        dict(beta=math.nan),
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        Divergence(**bad)
