"""The divergences as their definitions, in float64 and with autograd: what the operators are held against."""

import math

import torch


def relative(found, expected):
    """How far found is from expected, in float64, relative to its norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def assert_as_exact(divergence, logits, found, expected):
    """`found` and `expected`, (value, gradient) [tokens] and [tokens, columns] each, of fp32 `logits` (student's, teacher's): within
    1e-5, and what comes of rounding the ratios T/S by δ, as logits over T and their differences are. That is relative to the
    divergence's own size, D = curvature/2 · Σ S·d² for two models that are close, whatever its weights."""
    kind, w = divergence.form
    curvature = {'jsd': w * (1 - w), 'skew_forward_kl': (1 - w) ** 2, 'skew_reverse_kl': w**2}.get(kind, 1.0)
    delta = math.expm1(min(1e-7 * (5 + max(float(z.detach().max()) for z in logits) / divergence.temperature), 80))
    (value, gradient), (right, right_gradient) = ([x.detach().double() for x in pair] for pair in (found, expected))
    assert (value >= 0).all() and value.isfinite().all() and gradient.isfinite().all(), divergence
    bound = delta if kind == 'tvd' else delta * (right + (curvature * right).sqrt() + curvature * delta)
    assert ((value - right).abs() <= 1e-5 * right + bound).all(), (divergence, value, right)
    if kind not in ('forward_kl', 'reverse_kl', 'tvd'):
        # A plain KL's gradient goes on beyond the limit of its log-ratio, which autograd takes for a constant; a TVD's jumps where
        # two probabilities are equal.
        off = (gradient - right_gradient).norm(dim=-1)
        bound = 2 * delta * (right + curvature) / divergence.temperature
        assert (off <= 1e-5 * right_gradient.norm(dim=-1) + bound).all(), (divergence, off)


def sure_of_its_labels(vocab_size):
    """(hidden states, head, labels) of 16 tokens, of whose labels the head is certain: cross-entropies below 1e-10."""
    hidden, weight, labels = torch.eye(16), torch.zeros(vocab_size, 16), torch.arange(16) * 37 % vocab_size
    weight[labels, torch.arange(16)] = torch.linspace(35.3, 99.7, 16)
    return hidden, weight, labels


def logits(hidden, weight, bias=None, lora=None, transform=None):
    z = hidden @ weight.t()
    if lora is not None:
        a, b, scaling = lora
        z = z + scaling * (hidden @ a.t()) @ b.t()
    if bias is not None:
        z = z + bias
    if transform is not None:
        z = z * transform.scale
        if transform.softcap is not None:
            z = transform.softcap * torch.tanh(z / transform.softcap)
    return z


def _kl(log_p, log_q):
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p > -1e29, terms, torch.zeros_like(terms)).sum(-1)


def _mixture(log_t, log_s, w):
    log_w = torch.tensor([w, 1 - w], dtype=log_s.dtype).log()
    return torch.logsumexp(torch.stack([log_t + log_w[0], log_s + log_w[1]]), 0)


def from_log_probs(divergence, log_s, log_t):
    kind, beta, skew = divergence.kind, divergence.beta, divergence.skew
    if (kind == 'jsd' and beta == 0) or kind == 'forward_kl' or (kind == 'skew_forward_kl' and skew == 0):
        return _kl(log_t, log_s)
    if (kind == 'jsd' and beta == 1) or kind == 'reverse_kl' or (kind == 'skew_reverse_kl' and skew == 0):
        return _kl(log_s, log_t)
    if kind == 'jsd':
        log_m = _mixture(log_t, log_s, beta)
        return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)
    if kind == 'skew_forward_kl':
        return _kl(log_t, _mixture(log_t, log_s, skew))
    if kind == 'skew_reverse_kl':
        return _kl(log_s, _mixture(log_t, log_s, 1 - skew))
    if kind == 'tvd':
        return (log_t.exp() - log_s.exp()).abs().sum(-1) / 2
    raise ValueError(kind)


def divergence_of_logits(divergence, student, teacher, vocab_size=None):
    vocab_size = vocab_size or min(student.shape[1], teacher.shape[1])
    log_s, log_t = (torch.log_softmax(z[:, :vocab_size] / divergence.temperature, -1) for z in (student, teacher))
    return from_log_probs(divergence, log_s, log_t)


def cross_entropy(student, labels, vocab_size=None, temperature=1.0):
    """temperature: One of all tokens or [tokens]."""
    z = student[:, :vocab_size] / torch.as_tensor(temperature, dtype=student.dtype, device=student.device)[..., None]
    return torch.nn.functional.cross_entropy(z, labels, ignore_index=-100, reduction='none')


def divergence_of_buckets(divergence, student, logprobs, ids, tail, temperature, vocab_size=None, at=None, slack=0.0):
    """Row by row, with Python's lists of the ids that count. Of the masses that the teacher's tail may have at the divergence's
    temperature, that at which it is least is found by looking at many. Where each row's is goes to the list `at`.
    slack: how far 1 - Σ of the probabilities may be from the tail's mass."""
    vocab_size = vocab_size or student.shape[1]
    power = temperature / divergence.temperature
    values = []
    for z, lp, row in zip(student, logprobs, ids, strict=True):
        log_s = torch.log_softmax(z[:vocab_size] / divergence.temperature, -1)
        finite = [j for j, p in enumerate(lp.tolist()) if p > -float('inf')]
        keep = [j for j in finite if 0 <= row[j] < vocab_size]
        picked = row[keep]
        if len(picked) == 0:
            values.append(z.sum() * 0)
            continue
        s, t = log_s[picked], lp[keep] * power
        if tail == 'bucket':
            rest = torch.ones(vocab_size, dtype=torch.bool, device=z.device)
            rest[picked] = False
            s = torch.cat([s, torch.logsumexp(log_s[rest], 0)[None]])
            elsewhere = [math.exp(float(lp[j]) * power) for j in finite if j not in keep]
            mass, ceiling = -math.expm1(float(lp[finite].logsumexp(0))), float(lp[finite].min().exp())
            sums = [sums_of_powers(m, ceiling, vocab_size - len(keep), power) for m in (mass - slack, mass + slack)]
            ends = [sum(elsewhere) + end for end in (sums[0][0], sums[1][1])]
            found = least_divergent_tail(divergence, s, t, *ends)
            t = torch.cat([t, found[None]])
            if at is not None:
                least, largest = (abs(float(found.detach()) - math.log(end)) < 1e-9 for end in ends)
                at.append('least' if least else 'largest' if largest else 'between')
        values.append(from_log_probs(divergence, torch.log_softmax(s, -1), torch.log_softmax(t, -1)))
    return torch.stack(values)


def sums_of_powers(mass, ceiling, columns, power):
    """The least and the largest Σ p^power of so many p <= ceiling, of which Σ p = mass."""
    full = int(mass // ceiling)
    evenly, packed = columns * (mass / columns) ** power, full * ceiling**power + max(mass - full * ceiling, 0) ** power
    return (mass, mass) if power == 1 else (min(evenly, packed), max(evenly, packed))


def least_divergent_tail(divergence, s, t, least, largest):
    """The logarithm of the mass from `least` to `largest` beside the teacher's t [k] at which its divergence from s [k + 1] is least."""
    least, largest = math.log(least), math.log(largest)
    if least < largest:
        with torch.no_grad():
            low, high = least, largest
            for _ in range(25):  # an interval of 1 nat ends as one of 1e-20
                at = torch.linspace(low, high, 17, dtype=t.dtype, device=t.device)
                log_t = torch.log_softmax(torch.cat([t.expand(17, -1), at[:, None]], -1), -1)
                best = int(from_log_probs(divergence, s.expand(17, -1), log_t).argmin())
                low, high = float(at[max(best - 1, 0)]), float(at[min(best + 1, 16)])
            found = float(at[best])
        even = s[-1] - s[:-1].logsumexp(0) + t.logsumexp(0)
        if divergence.kind == 'tvd' and least < even < largest:  # a kink: the student's share, wherever that goes
            return even
        least = found
    return torch.tensor(least, dtype=t.dtype, device=t.device)
