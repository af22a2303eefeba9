"""Held against other implementations: TRL and Liger in fp32, where they are right, and ms-swift 4.6.0 where it is not.

Each `stock` part records what ms-swift does with the same tensors; it fails if a later version no longer does.
"""

import pytest
import torch
from divergence_reference import relative

from swift_gkd_plugin.divergence import Divergence, linear_divergence, logits_divergence, topk_divergence


def models(tokens=40, dim=32, vocab=1500, spread=0.3):
    torch.manual_seed(0)
    return (
        torch.randn(tokens, dim).requires_grad_(),
        (torch.randn(vocab, dim) * spread).requires_grad_(),
        torch.randn(tokens, dim),
        torch.randn(vocab, dim) * spread,
    )


@pytest.mark.parametrize('beta', [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize('temperature', [0.9, 2.0])
def test_trl(beta, temperature):
    gkd = pytest.importorskip('trl.experimental.gkd')
    hs, ws, ht, wt = models()
    student = hs @ ws.t()
    expected = gkd.GKDTrainer.generalized_jsd_loss(student[None], (ht @ wt.t())[None], beta=beta, temperature=temperature, reduction='sum')
    gradients = torch.autograd.grad(expected, (hs, ws))
    found = linear_divergence(hs, ws, ht, wt, Divergence('jsd', beta, temperature), reduction='sum', chunk_tokens=16)
    assert relative(found, expected) < 1e-5
    for one, right in zip(torch.autograd.grad(found, (hs, ws)), gradients, strict=True):
        assert relative(one, right) < 1e-4


@pytest.mark.parametrize('beta', [0.0, 0.3, 0.5, 1.0])
def test_liger(beta):
    pytest.importorskip('triton', reason='Liger imports Triton')
    chunked = pytest.importorskip('liger_kernel.chunked_loss')
    hs, ws, ht, wt = models()
    fused = chunked.LigerFusedLinearJSDLoss(beta=beta, temperature=0.9, compiled=False, weight_hard_loss=0.0, weight_soft_loss=1.0)
    expected = fused(hs, ws, ht, wt, torch.zeros(len(hs), dtype=torch.long))
    gradients = torch.autograd.grad(expected, (hs, ws))
    found = linear_divergence(hs, ws, ht, wt, Divergence('jsd', beta, 0.9), reduction='sum') / len(hs)
    assert relative(found, expected) < 1e-5
    for one, right in zip(torch.autograd.grad(found, (hs, ws)), gradients, strict=True):
        assert relative(one, right) < 1e-4


@pytest.fixture(scope='module')
def stock():
    return pytest.importorskip('swift.rlhf_trainers.gkd_loss')


def stock_loss(stock, student, teacher, beta, temperature=1.0):
    total, _ = stock.gkd_loss(student[None], teacher, torch.zeros(1, len(student), dtype=torch.long), beta, temperature)
    return total


def full(stock, logits):
    return stock.TeacherOutput(full_logits=logits[None])


def top(stock, logprobs, ids):
    return stock.TeacherOutput(topk_logprobs=logprobs[None], topk_indices=ids[None])


@pytest.mark.parametrize('beta', [0.0, 0.5, 1.0])
def test_stock_agrees_where_it_is_right(stock, beta):
    hs, ws, ht, wt = models()
    expected = stock_loss(stock, hs @ ws.t(), full(stock, ht @ wt.t()), beta, 0.9)
    found = linear_divergence(hs, ws, ht, wt, Divergence('jsd', beta, 0.9), reduction='sum')
    assert relative(found, expected) < 1e-5
    values, ids = (ht @ wt.t()).topk(20)
    expected = stock_loss(stock, hs @ ws.t(), top(stock, torch.log_softmax(values, -1), ids), beta, 0.9)
    found = topk_divergence(
        hs,
        ws,
        torch.log_softmax(values, -1),
        ids,
        Divergence('jsd', beta, 0.9),
        tail='renormalize',
        topk_temperature=1.0,
        reduction='sum',
    )
    assert relative(found, expected) < 1e-5


def test_d1_jsd_in_bf16_is_negative_in_stock(stock):
    torch.manual_seed(0)
    student = torch.randn(64, 20000) * 2
    teacher = (student + 0.05 * torch.randn_like(student)).bfloat16()
    student = student.bfloat16()
    log_s, log_t = (torch.log_softmax(z.double(), -1) for z in (student, teacher))
    log_m = torch.logaddexp(log_s, log_t) - torch.tensor(2.0).double().log()
    true = (log_s.exp() * (log_s - log_m) + log_t.exp() * (log_t - log_m)).sum() / 2
    assert stock_loss(stock, student, full(stock, teacher), 0.5) < 0 < true
    assert abs(logits_divergence(student, teacher, Divergence(), reduction='sum') / true - 1) < 1e-5


def test_d2_memory_grows_with_tokens_times_vocabulary_in_stock(stock):
    """Saved for backward, in units of [tokens, vocab]: about 7 in stock at β = 0.5 whatever its chunk size, none in
    ours."""
    hs, ws, ht, wt = models(tokens=1024, dim=8, vocab=2000)

    def saved(loss):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.nbytes}) or t, lambda t: t):
            loss()
        return sum(kept.values()) / (1024 * 2000 * 4)

    teacher = full(stock, ht @ wt.t())
    assert saved(lambda: stock_loss(stock, hs @ ws.t(), teacher, 0.5)) > 5
    assert saved(lambda: linear_divergence(hs, ws, ht, wt, Divergence(), reduction='sum')) < 0.02
    assert saved(lambda: linear_divergence(hs, ws, ht, wt, Divergence())) < 0.02


def test_d8_student_mass_outside_the_top_k_is_free_in_stock(stock):
    torch.manual_seed(1)
    teacher = torch.randn(16, 400) * 4
    values, ids = torch.log_softmax(teacher, -1).topk(32)
    inside = torch.zeros(16, 400, dtype=torch.bool).scatter_(1, ids, True)
    identity, hidden = torch.eye(400), torch.randn(16, 400)
    losses, gradients, ours = [], [], []
    for shift in (0.0, 4.0, 12.0):
        student = torch.where(inside, hidden, hidden + shift).requires_grad_()
        loss = stock_loss(stock, student, top(stock, values, ids), 0.5)
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, student)[0][~inside].abs().max())
        found = topk_divergence(student, identity, values, ids, Divergence(), reduction='sum')
        ours.append(float(found.detach()))
        assert torch.autograd.grad(found, student)[0][~inside].abs().max() > 0
    assert max(losses) - min(losses) < 1e-4 and max(gradients) == 0
    assert ours[0] < ours[1] < ours[2]


def test_d9_a_teacher_id_beyond_the_student_is_an_error_in_stock(stock):
    hs, ws, _, _ = models(vocab=264)
    ids = torch.tensor([[1, 278, 5]]).expand(len(hs), 3).contiguous()
    logprobs = torch.log(torch.tensor([[0.5, 0.3, 0.1]])).expand(len(hs), 3).contiguous()
    with pytest.raises(RuntimeError, match='out of bounds'):
        stock_loss(stock, hs @ ws.t(), top(stock, logprobs, ids), 0.5)
    found = topk_divergence(hs, ws, logprobs, ids, Divergence(), reduction='sum')
    dropped = topk_divergence(hs, ws, logprobs[:, [0, 2]], ids[:, [0, 2]], Divergence(), reduction='sum')
    assert torch.isfinite(found) and relative(found, dropped) < 1e-6


def test_d10_missing_columns_borrow_the_teachers_mass_in_stock(stock):
    """A teacher with nearly all its mass on ids that the student lacks: stock copies its logits into the student's."""
    torch.manual_seed(2)
    teacher = torch.randn(32, 160)
    teacher[:, 152:] += 10
    student = torch.randn(32, 152)
    shared = [torch.log_softmax(z[:, :152].double(), -1) for z in (student, teacher)]
    true = (shared[1].exp() * (shared[1] - shared[0])).sum()
    assert stock_loss(stock, student, full(stock, teacher), 0.0) < 0.05 * true
    assert relative(logits_divergence(student, teacher, Divergence('forward_kl'), reduction='sum'), true) < 1e-5


def test_d12_minus_infinity_is_nan_in_stock(stock):
    student, teacher = torch.randn(2, 4, 50)
    student[:, 40:] = teacher[:, 40:] = -float('inf')
    assert torch.isnan(stock_loss(stock, student, full(stock, teacher), 0.5))
    assert torch.isfinite(logits_divergence(student, teacher, Divergence())).all()


def test_d13_liger_as_stock_calls_it_makes_whole_logits():
    """Given [batch, sequence, dim] Liger splits the batch into chunks of 1024 rows, so it never splits. Ours is called
    flat."""
    pytest.importorskip('triton', reason='Liger imports Triton')
    chunked = pytest.importorskip('liger_kernel.chunked_loss')
    hs, ws, ht, wt = models(tokens=2048, dim=8, vocab=500)
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.numel())
            return out

    fused = chunked.LigerFusedLinearJSDLoss(beta=0.5, compiled=False, weight_hard_loss=0.0)
    labels = torch.zeros(2, 1024, dtype=torch.long)
    with Watch():
        fused(hs.view(2, 1024, 8), ws, ht.view(2, 1024, 8), wt, labels)
    assert max(largest) >= 2048 * 500
    largest.clear()
    with Watch():
        linear_divergence(hs, ws, ht, wt, Divergence(), reduction='sum', chunk_tokens=256)
    assert max(largest) <= 256 * 500
