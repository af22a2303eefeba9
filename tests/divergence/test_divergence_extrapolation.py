"""A teacher that is extrapolated from a reference: T^λ · R^(1-λ), whatever gives the logits of the two."""

import dataclasses

import divergence_reference as definitions
import pytest
import torch
from divergence_reference import relative

from swift_gkd_plugin.divergence import Divergence, LogitTransform, Reference, TokenStats, linear_divergence, logits_divergence, memory
from swift_gkd_plugin.divergence import heads as heads_of_models
from swift_gkd_plugin.divergence.kinds import KINDS

TOKENS, DIM, OTHER, VOCAB = 19, 16, 12, 300
TIMES = [0.3, 1.25, 4.0]


def draw(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


@pytest.fixture
def case():
    """Of the three models (hidden states, head, bias, (A, B, scaling), transform); each has some rows more than the one before."""
    torch.manual_seed(0)
    sides = {}
    for name, dim, vocab, cap in (('student', DIM, VOCAB, None), ('teacher', OTHER, VOCAB + 10, 4.0), ('reference', DIM, VOCAB + 20, 9.0)):
        lora = (draw(3, dim), draw(vocab, 3, scale=0.1), 0.5)
        sides[name] = (draw(TOKENS, dim), draw(vocab, dim, scale=0.5), draw(vocab), lora, LogitTransform(softcap=cap))
    return sides


def cast(side, dtype):
    hidden, weight, bias, (a, b, scaling), transform = side
    return (*(x.to(dtype) for x in (hidden, weight, bias)), (a.to(dtype), b.to(dtype), scaling), transform)


def beyond(divergence, student, teacher, reference, by):
    """By the definition, of whole logits."""
    size = min(z.shape[1] for z in (student, teacher, reference))
    log_t, log_r = (torch.log_softmax(z[:, :size] / divergence.temperature, -1) for z in (teacher, reference))
    log_s = torch.log_softmax(student[:, :size] / divergence.temperature, -1)
    return definitions.from_log_probs(divergence, log_s, torch.log_softmax(by * log_t + (1 - by) * log_r, -1))


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float64, 1e-7), (torch.float32, 2e-5)])
@pytest.mark.parametrize('by', TIMES)
@pytest.mark.parametrize('kind', KINDS)
def test_value_and_gradients_are_those_of_the_definition(case, kind, by, dtype, bound):
    """All three with heads of their own: biases, low-rank terms, soft caps, other widths and vocabularies."""
    divergence = Divergence(kind, temperature=0.8)
    sides = {name: cast(side, dtype) for name, side in case.items()}
    weights = torch.rand(TOKENS)
    found, expected = [], []
    for out, ours in ((found, True), (expected, False)):
        hidden, weight, bias, (a, b, scaling), transform = sides['student'] if ours else cast(sides['student'], torch.float64)
        x = [t.clone().requires_grad_() for t in (hidden, weight, bias, a, b)]
        hidden, weight, bias, a, b = x
        if ours:
            (h_t, w_t, bias_t, lora_t, transform_t), (h_r, w_r, *rest) = sides['teacher'], sides['reference']
            bias_r, lora_r, transform_r = rest
            loss = linear_divergence(
                hidden,
                weight,
                h_t,
                w_t,
                divergence,
                token_weights=weights,
                student_bias=bias,
                teacher_bias=bias_t,
                student_transform=transform,
                teacher_transform=transform_t,
                student_lora=(a, b, scaling),
                teacher_lora=lora_t,
                reference=Reference(h_r, w_r, by, bias_r, transform_r, lora_r),
                chunk_tokens=7,
            )
        else:
            student = definitions.logits(hidden, weight, bias, (a, b, scaling), transform)
            teacher, reference = (definitions.logits(*cast(sides[name], torch.float64)) for name in ('teacher', 'reference'))
            loss = weights.double() * beyond(divergence, student, teacher, reference, by)
        out.append(loss)
        out.extend(torch.autograd.grad(loss.sum(), x))
    for one, right in zip(found, expected, strict=True):
        assert relative(one, right) < bound


@pytest.mark.parametrize('by', TIMES)
@pytest.mark.parametrize('kind', KINDS)
def test_of_ready_logits(kind, by):
    torch.manual_seed(1)
    divergence = Divergence(kind, temperature=1.7)
    student, teacher, reference = draw(TOKENS, 50), draw(TOKENS, 60), draw(TOKENS, 55)
    ours, exact = student.float().requires_grad_(), student.clone().requires_grad_()
    loss = logits_divergence(ours, teacher.float(), divergence, reference=Reference(reference.float(), None, by), chunk_tokens=4)
    expected = beyond(divergence, exact, teacher, reference, by)
    assert relative(loss, expected) < 1e-5
    (gradient,), (right,) = torch.autograd.grad(loss.sum(), ours), torch.autograd.grad(expected.sum(), exact)
    assert relative(gradient, right) < 1e-5


@pytest.mark.parametrize('by', TIMES)
def test_the_reverse_kl_is_the_objective_of_the_paper(by):
    """λ·E[log(T/R)] - KL(S‖R), up to the logarithm of Σ T^λ·R^(1-λ), which does not know the student."""
    torch.manual_seed(2)
    student, teacher, reference = (draw(TOKENS, 40) for _ in range(3))
    log_s, log_t, log_r = (torch.log_softmax(z, -1) for z in (student, teacher, reference))
    objective = (log_s.exp() * (by * (log_t - log_r) - (log_s - log_r))).sum(-1)
    constant = (by * log_t + (1 - by) * log_r).logsumexp(-1)
    loss = logits_divergence(student, teacher, Divergence('reverse_kl'), reference=Reference(reference, None, by))
    assert torch.allclose(-loss + constant, objective, rtol=1e-10)
    mixed = logits_divergence(student, by * teacher + (1 - by) * reference, Divergence('reverse_kl'))
    assert torch.allclose(loss, mixed, rtol=1e-10)


HEADS = {
    'one head': (True, True),
    'a copy for the reference': (True, False),
    'a copy for the teacher': (False, True),
    'three': (False, False),
}


def parts(heads, dtype, hidden=None):
    """(hidden, weight) of the three, whose heads have the same values, and are the same tensors or copies."""
    torch.manual_seed(3)
    weight = draw(VOCAB, DIM).to(dtype)
    hidden = [draw(TOKENS, DIM).to(dtype) for _ in range(3)] if hidden is None else [hidden.to(dtype)] * 3
    return list(zip(hidden, (weight, *(weight if same else weight.clone() for same in HEADS[heads])), strict=True))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('heads', HEADS)
@pytest.mark.parametrize('by', TIMES)
def test_equal_models_are_exactly_zero(heads, by, dtype):
    torch.manual_seed(4)
    for kind in KINDS:
        (h, w), teacher, reference = parts(heads, dtype, draw(TOKENS, DIM))
        h = h.clone().requires_grad_()
        loss = linear_divergence(h, w, *teacher, Divergence(kind, temperature=0.7), reference=Reference(*reference, by), reduction='sum')
        loss.backward()
        assert loss == 0 and not h.grad.any(), (kind, loss)


@pytest.mark.parametrize('heads', HEADS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_factor_of_one_and_a_teacher_that_is_the_reference_change_nothing(heads, dtype):
    """To the last bit: both leave the teacher's logits as they are; of one head for two of the three in fp32, as they are without the
    product of a difference."""
    student, teacher, other = parts(heads, dtype)
    plain = linear_divergence(*student, *teacher, Divergence())
    assert torch.equal(linear_divergence(*student, *teacher, Divergence(), reference=Reference(*other, 1.0)), plain)
    same = Reference(teacher[0], other[1], 2.5)
    if heads == 'a copy for the reference':
        plain = linear_divergence(*student, teacher[0], teacher[1].clone(), Divergence())
    assert torch.equal(linear_divergence(*student, *teacher, Divergence(), reference=same), plain)


@pytest.mark.parametrize('together', ['student and teacher', 'student and reference', 'teacher and reference', 'all'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_one_head_for_some_of_the_three(together, dtype):
    """And another one for the third, say a trained head and that of the base."""
    (h, w), (h_t, _), (h_r, _) = parts('one head', dtype)
    other, bias = draw(VOCAB, DIM).to(dtype), draw(VOCAB).to(dtype)
    w_s, w_t, w_r = (w if name in together or together == 'all' else other for name in ('student', 'teacher', 'reference'))
    loss = linear_divergence(h, w_s, h_t, w_t, Divergence(), student_bias=bias, teacher_bias=bias, reference=Reference(h_r, w_r, 1.5, bias))
    logits = [x.double() @ y.double().t() + bias.double() for x, y in ((h, w_s), (h_t, w_t), (h_r, w_r))]
    assert relative(loss, beyond(Divergence(), *logits, 1.5)) < 1e-5


@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize('heads', HEADS)
def test_accuracy_of_close_models(heads, dtype, bound):
    """Three models that are 1e-3 nats and less apart, as at the start of a self-distillation. Nothing is rounded to half precision."""
    (h, w), (_, w_t), (_, w_r) = parts(heads, dtype)
    close = [(h + (0.01 * torch.randn(TOKENS, DIM)).to(dtype)) for _ in range(2)]
    loss = linear_divergence(h, w, close[0], w_t, Divergence('reverse_kl'), reference=Reference(close[1], w_r, 1.5))
    exact = [x.double() @ w.double().t() for x in (h, *close)]
    expected = beyond(Divergence('reverse_kl'), *exact, 1.5)
    # Logits of up to 15 are rounded to 1e-6 of themselves unless their difference is one product.
    slack = 0 if heads == 'one head' and dtype == torch.float32 else 20 * 1e-6 * expected.sqrt()
    assert expected.max() < 0.02 and ((loss - expected).abs() <= bound * expected + slack).all()


@pytest.mark.parametrize(
    ('heads', 'dtype', 'products'), [('one head', torch.float32, 2), ('three', torch.float32, 3), ('one head', torch.bfloat16, 3)]
)
def test_products_and_memory(monkeypatch, heads, dtype, products):
    """One head and fp32: the hidden states are mixed. Else there is a product more, in memory that is there anyway."""
    student, teacher, other = parts(heads, dtype)
    made, sizes = [], []
    product, rows = heads_of_models.LinearHead.logits, memory.Rows.__init__
    monkeypatch.setattr(heads_of_models.LinearHead, 'logits', lambda *a: made.append(1) or product(*a))
    monkeypatch.setattr(memory.Rows, '__init__', lambda self, *a: sizes.append(a[:2]) or rows(self, *a))
    linear_divergence(*student, *teacher, Divergence())
    assert len(made) == 2
    without = list(sizes)
    linear_divergence(*student, *teacher, Divergence(), reference=Reference(*other, 2.0))
    assert len(made) == 2 + products and sizes == without * 2


@pytest.mark.parametrize('by', TIMES)
@pytest.mark.parametrize('side', ['teacher', 'reference', 'both'])
def test_masked_columns_have_probability_zero(side, by):
    """Also where T^λ / R^(λ-1) would be infinite."""
    torch.manual_seed(5)
    student, teacher, reference = (draw(TOKENS, 40).float() for _ in range(3))
    free = slice(0, 33)
    for name, z in (('teacher', teacher), ('reference', reference)):
        if side in (name, 'both'):
            z[:, 33:] = -torch.inf
    student[:, 33:] = -torch.inf
    for kind in KINDS:
        loss = logits_divergence(student, teacher, Divergence(kind), reference=Reference(reference, None, by))
        expected = logits_divergence(
            student[:, free], teacher[:, free], Divergence(kind), reference=Reference(reference[:, free], None, by)
        )
        assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-7), kind
    bias = torch.zeros(VOCAB).index_fill(0, torch.arange(290, VOCAB), -torch.inf)
    (h, w), teacher, (h_r, w_r) = parts('three', torch.float32)
    biases = {'teacher_bias': bias if side != 'reference' else None, 'student_bias': bias}
    other = Reference(h_r, w_r, by, bias if side != 'teacher' else None)
    loss = linear_divergence(h, w, *teacher, Divergence('reverse_kl'), reference=other, **biases)
    expected = beyond(Divergence('reverse_kl'), *((x.double() @ y.double().t())[:, :290] for x, y in ((h, w), teacher, (h_r, w_r))), by)
    assert relative(loss, expected) < 1e-4


def test_statistics_are_those_of_the_mixture():
    torch.manual_seed(6)
    student, teacher, reference = (draw(TOKENS, 40).float() for _ in range(3))
    labels = torch.randint(40, (TOKENS,))
    found, expected = TokenStats(detail=True), TokenStats(detail=True)
    logits_divergence(student, teacher, Divergence(), reference=Reference(reference, None, 1.5), labels=labels, stats=found)
    logits_divergence(student, torch.lerp(reference, teacher, 1.5), Divergence(), labels=labels, stats=expected)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, name), value), name


@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_partition_and_a_second_pass(reduction):
    """A trained head under per-token weights needs the teacher's logits twice."""
    found = []
    for chunk in (3, None):
        (h, w), teacher, other = parts('three', torch.float32)
        w = w.requires_grad_()
        loss = linear_divergence(
            h, w, *teacher, Divergence('tvd'), reference=Reference(*other, 1.5), reduction=reduction, chunk_tokens=chunk
        )
        found.append((loss, *torch.autograd.grad(loss.sum(), w)))
    for one, other in zip(*found, strict=True):
        assert relative(one, other.double()) < 3e-6


def test_what_does_not_fit_is_refused():
    (h, w), teacher, other = parts('three', torch.float32)
    reference = Reference(*other, 1.5)
    for bad in (0.0, -1.0, float('inf'), float('nan')):
        with pytest.raises(ValueError, match='extrapolation must be positive and finite'):
            dataclasses.replace(reference, extrapolation=bad)
    with pytest.raises(ValueError, match='needs a teacher beside it'):
        linear_divergence(h, w, None, None, Divergence(), reference=reference, labels=torch.zeros(TOKENS, dtype=torch.long))
    with pytest.raises(ValueError, match='a weight of its own'):
        linear_divergence(h, w, *teacher, Divergence(), reference=Reference(h @ w.t(), None, 1.5))
    with pytest.raises(ValueError, match='without a weight'):
        logits_divergence(h @ w.t(), h @ w.t(), Divergence(), reference=reference)
    with pytest.raises(ValueError, match='student_hidden has 19 tokens, reference_hidden 18'):
        linear_divergence(h, w, *teacher, Divergence(), reference=dataclasses.replace(reference, hidden=h[1:]))
    with pytest.raises(ValueError, match=r'reference_weight \[300, 15\] does not fit'):
        linear_divergence(h, w, *teacher, Divergence(), reference=dataclasses.replace(reference, weight=w[:, 1:]))
