"""The mass of a top-k teacher's tail: what is known of it, and which of the masses that it may be counts.

**Rounding.** Without `tail_logprobs` all that is known of the mass is 1 - Σ of the k probabilities, a difference that fp32
rounds: for a confident teacher it comes out as 0 or below, and a student's tail of 1e-4 would be 1e4 nats off in KL(S‖T). So
the mass is taken to lie within `_SLACK` of that difference.

**Temperature.** The log-probabilities p were taken at a temperature τ, and the divergence is wanted at T. There the teacher's
are p^s with s = τ/T, renormalised: of its listed ids that is known, of its tail the sum Σ p^s over the columns that are not
listed, of which only the mass m = Σ p, the number n and the ceiling c >= p are, c the smallest probability that is listed. A sum
of convex functions (s > 1) is least where all are equal, and largest where as many as can be are at the ceiling and the others
0 but for one:

    evenly   n·(m/n)^s                  packed   c^s·(⌊m/c⌋ + (m/c - ⌊m/c⌋)^s)

For s < 1 it is the other way round. Both grow with m.

**What counts.** The mass at which the divergence of the buckets is least. That of the true mass is at most the full one, and so
that least one is. Let q be the tail's share of the teacher, b of the student, p̂ and ŝ the distributions of the two on the ids
that are listed. The teacher's buckets (1-q)·p̂ and q are linear in q, so D is convex in q. With ∂D/∂T_i = g(T_i/S_i) it is least
where g(q/b) = Σ p̂·g((1-q)·p̂ / (1-b)·ŝ):

    KL(S‖T), TVD   q = b
    KL(T‖S)        log(q/(1-q)) = log(b/(1-b)) + KL(p̂‖ŝ)
    mixtures       no closed form: Newton's steps, and halves of the interval where they are not half the step before

The student's gradient is that of D at this mass taken for a constant: either D's slope in q is 0, or q is an end, which the
student does not move. But for the TVD at q = b, which has a kink there: see `topk._buckets`.
"""

import torch
from torch import Tensor

from .kinds import MAX_LOG_RATIO, Divergence
from .sweeps import LOWEST_LOGIT

# How far 1 - Σ of a teacher's k probabilities may be from its tail's mass. torch's log_softmax over 151,936 fp32 logits is off
# by up to 2e-5 on a CPU: beside one large probability most of a tail is lost in the running sum.
_SLACK = 2.0**-15
# At τ = T a tail so many times larger is taken as it is: its logarithm is hardly off, and neither is the divergence.
KNOWN = 32
# Of the search. Five or six steps are usual; so many halve an interval of 1000 nats to one in which nothing changes.
STEPS = 40
# Nats of the tail's odds, after a step as small as which there is no other.
STILL = 1e-9


def slack(dtype: torch.dtype) -> float:
    """How far 1 - Σ of the k probabilities may be from the tail's mass."""
    eps = torch.finfo(dtype).eps
    return 4 * eps if dtype == torch.float64 else max(_SLACK, 4 * eps)


def masses(listed: Tensor, slack: float, known: float) -> tuple[Tensor, Tensor]:
    """The least and the largest log-mass [rows, 1] beside `listed` [rows, k], log-probabilities in fp64; LOWEST_LOGIT for none.
    known: A mass above it has no slack."""
    mass = -torch.expm1(torch.logsumexp(listed, -1, keepdim=True))
    slack = torch.where(mass > known, 0.0, slack)
    return tuple(x.clamp(0, 1).log().clamp_min(LOWEST_LOGIT) for x in (mass - slack, mass.clamp_min(0) + slack))


def powers(least: Tensor, largest: Tensor, ceiling: Tensor, columns: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """The least and the largest log Σ p^power [rows, 1] of `columns` probabilities that are at most exp(ceiling), and whose sum has a
    logarithm from `least` to `largest`; columns at least 1, all [rows, 1] in fp64."""
    evenly, packed = (largest, least) if power < 1 else (least, largest)
    ceiling = torch.maximum(ceiling, packed - columns.log())  # what is listed need not be the largest, nor be rounded up
    full = (packed - ceiling).exp()
    packed = power * ceiling + (full.floor() + full.frac() ** power).log()
    evenly = power * evenly + (1 - power) * columns.log()
    least, largest = (packed, evenly) if power < 1 else (evenly, packed)
    return least.clamp_min(LOWEST_LOGIT), torch.maximum(least, largest).clamp_min(LOWEST_LOGIT)


def least_divergent(divergence: Divergence, student: Tensor, listed: Tensor, least: Tensor, largest: Tensor) -> Tensor:
    """The teacher's log-mass [rows, 1] in the tail, from `least` to `largest`, at which `divergence` is least.

    student: [rows, k + 1] log-probabilities in fp64, the tail last. listed: [rows, k] the teacher's, which like `least` and
    `largest` need not be normalised.
    """
    total = listed.logsumexp(-1, keepdim=True)
    inside = student[:, :-1].logsumexp(-1, keepdim=True)
    odds = student[:, -1:] - inside
    kind, w = divergence.form
    if kind not in ('reverse_kl', 'tvd'):
        share = (listed - total).exp()
        ratio = ((listed - total) - (student[:, :-1] - inside)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        further = odds + torch.linalg.vecdot(share, ratio)[:, None]
        if kind == 'forward_kl':
            odds = further
        else:
            low = odds + torch.where(share > 0, ratio, 0).amin(-1, keepdim=True)
            low = torch.minimum(torch.maximum(low, least - total), largest - total)
            odds = _search(kind, w, (student, listed - total), share, low, further, largest - total)
    return torch.minimum(torch.maximum(odds + total, least), largest)


def _search(kind: str, w: float, logs: tuple[Tensor, Tensor], share: Tensor, low: Tensor, start: Tensor, high: Tensor) -> Tensor:
    """The teacher's log-odds [rows, 1] from `low` to `high` at which a mixture's divergence is least."""
    at_ends = [_slopes(kind, w, logs, share, end)[0] for end in (low, high)]
    low, high = torch.where(at_ends[1] <= 0, high, low), torch.where(at_ends[0] >= 0, low, high)
    at, step = torch.minimum(torch.maximum(start, low), high), high - low
    for _ in range(STEPS):
        slope, steepness = _slopes(kind, w, logs, share, at)
        low, high = torch.where(slope < 0, at, low), torch.where(slope > 0, at, high)
        newton = -slope / steepness
        good = (at + newton >= low) & (at + newton <= high) & (newton.abs() <= step.abs() / 2)
        step = torch.where(good, newton, (low + high) / 2 - at)
        at = at + step
        if not (step.abs() > STILL).any():
            break
    return at


def _slopes(kind: str, w: float, logs: tuple[Tensor, Tensor], share: Tensor, odds: Tensor) -> tuple[Tensor, Tensor]:
    """dD/dq [rows, 1] but for a factor, and its derivative with respect to the odds. logs: the student's buckets, and the teacher's
    listed ids among themselves, of which `share` are the probabilities."""
    student, listed = logs
    in_tail, inside = torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)
    marginal, rise = _marginal(kind, w, torch.cat([inside + listed, in_tail], -1) - student)
    average, average_rise = (torch.linalg.vecdot(share, x[:, :-1])[:, None] for x in (marginal, rise))
    return marginal[:, -1:] - average, rise[:, -1:] * inside.exp() + average_rise * in_tail.exp()


def _marginal(kind: str, w: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """∂D/∂T of x = log(T/S) but for a factor and a constant, and its derivative. With h = (1-w)·S/M: log(T/M) for the JSD,
    log(T/M) + h for KL(T‖M), and -h for KL(S‖M)."""
    y = x.abs().neg().exp()
    mixture = torch.where(x > 0, w + (1 - w) * y, w * y + (1 - w))  # over the larger one
    h = (1 - w) * torch.where(x > 0, y, 1.0) / mixture
    if kind == 'skew_reverse_kl':
        return -h, h * (1 - h)
    log = x.clamp(max=0) - mixture.log()
    return (log + h, h * h) if kind == 'skew_forward_kl' else (log, h)
