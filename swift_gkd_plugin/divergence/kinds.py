"""The divergences: one closed form each, for the value and for its gradient.

Notation, for one token. S and T are the student's and the teacher's distributions, at the same temperature, over the
same columns v; d = log T - log S; M = w·T + (1-w)·S is a mixture. For logits z with S = softmax(z),

    ∂D/∂z_v = S_v (a_v - Σ_u S_u a_u),        a_v = ∂D/∂S_v  up to a constant that is the same for all v.

`a` is called the slope, Σ S a its centre.

**Why not sum p·log(p/q).** Each column of such a sum is of first order in d, and their sum of second order: for two
models that are close, fp32 loses it (and bf16 turns it negative). Adding q - p to a column of KL(p‖q) leaves the sum as
it is, because both distributions sum to one, and makes the column p·log(p/q) - p + q >= 0, of second order in d. An
error of the normalisers then enters at second order too.

**Why the larger probability is factored out.** With P = max(S, T), E = -|d|, y = expm1(E) in [-1, 0], everything else
about a column is a function of d, bounded for any distance between the two: S = P·s and T = P·t with
s = exp(min(-d, 0)) and t = exp(min(d, 0)), one of them 1. In the two plain KLs the larger one's column is P·near, where it is
the first argument, or the smaller one's P·far:

    near = y - E                                far = (1+y)·E - y

With a mixture, l = log(M/S) and m = log(M/T) = l - d, and the columns of KL(T‖M) and KL(S‖M) are

    P·((1-w)(s - t) - t·m)                      P·(w(t - s) - s·l)

All are >= 0, and exactly 0 at d = 0. Where rounding of the last bit makes one negative (|d| below 1e-6) the column is
read as 0.

**Why another column where M is all but one side.** With a w of 1e-6, KL(S‖M) is of the order of w², but the terms of its
column of the order of w. The column is also S·(e^l - 1 - l), and a series where l is small. Likewise KL(T‖M), with 1-w and m.

**Why the smaller weight.** M/S = 1 + w·expm1(d) = 1 - w + w·e^d, and M/T is the same with 1-w for w and -d for d. The one
whose weight is at most ½ never cancels: neither where d is large nor where the weight is 1e-6 and the logarithm as small.

All functions work in place on blocks [rows, columns] of fp32 or fp64 that the caller owns. Weights are factors of their own,
never an `alpha` of add_ or sub_: the cache on disk of torch.compile (torch 2.13) takes kernels that differ in that alone for
the same.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ('jsd', 'forward_kl', 'reverse_kl', 'skew_forward_kl', 'skew_reverse_kl', 'tvd')

# log(T/S) is limited to this many nats where a divergence is linear in it, so that a column to which one side gives
# probability 0 (a logit of -inf) costs much, but not infinitely much.
MAX_LOG_RATIO = 1e4

# The largest exponent that is taken, also in fp32. A mixture's logarithm is linear from there on.
_MAX_EXPONENT = 80.0

# The other side's weight in a mixture M below which a column of KL(S‖M) is made of e^l - 1 - l; above, little cancels.
_SLIGHT = 1 / 8


@dataclass(frozen=True)
class Divergence:
    """What is measured between teacher T and student S, both softened by `temperature`.

    ==================  ==========================================  ===============================================
    kind                D                                           from
    ==================  ==========================================  ===============================================
    `jsd`               β·KL(T‖M) + (1-β)·KL(S‖M), M = β·T+(1-β)·S  GKD, Agarwal et al. 2024 (arXiv 2306.13649)
    `forward_kl`        KL(T‖S), mode covering                      Hinton et al. 2015 (arXiv 1503.02531)
    `reverse_kl`        KL(S‖T), mode seeking                       MiniLLM, Gu et al. 2024 (arXiv 2306.08543)
    `skew_forward_kl`   KL(T‖α·T + (1-α)·S)                         DistiLLM, Ko et al. 2024 (arXiv 2402.03898)
    `skew_reverse_kl`   KL(S‖α·S + (1-α)·T)                         DistiLLM
    `tvd`               ½ Σ |T - S|                                 f-DISTILL, Wen et al. 2023 (arXiv 2307.15190)
    ==================  ==========================================  ===============================================

    `beta` (β, of `jsd`) in [0, 1]. As in GKD, β = 0 *is* the forward KL and β = 1 the reverse KL, although the formula
    above tends to 0 there: its gradient shrinks with β(1-β), and jumps at the two ends.
    `skew` (α, of the skewed kinds) 0 or in [1e-6, 1): the slope is bounded by 1/α, and α = 0 is the plain KL.
    `temperature` > 0 divides the logits of both sides. The value is not multiplied by temperature².

    Raises ValueError for a kind that is not in the table or a number outside its range.
    """

    kind: str = 'jsd'
    beta: float = 0.5
    temperature: float = 1.0
    skew: float = 0.1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f'divergence kind {self.kind!r} is not one of {", ".join(KINDS)}')
        if not 0 <= self.beta <= 1:
            raise ValueError(f'beta must lie in [0, 1], got {self.beta}')
        if not 0 < self.temperature < float('inf'):
            raise ValueError(f'temperature must be positive and finite, got {self.temperature}')
        if self.skew != 0 and not 1e-6 <= self.skew < 1:
            raise ValueError(f'skew must be 0 or lie in [1e-6, 1), got {self.skew}')

    @property
    def form(self) -> tuple[str, float]:
        """The kind after its limits were taken, and the teacher's weight w in its mixture M."""
        if self.kind == 'jsd':
            return {0: ('forward_kl', 0.0), 1: ('reverse_kl', 1.0)}.get(self.beta, ('jsd', float(self.beta)))
        if self.kind == 'skew_forward_kl':
            return (self.kind, float(self.skew)) if self.skew else ('forward_kl', 0.0)
        if self.kind == 'skew_reverse_kl':
            return (self.kind, 1.0 - self.skew) if self.skew else ('reverse_kl', 1.0)
        return self.kind, {'forward_kl': 0.0, 'reverse_kl': 1.0, 'tvd': 0.5}[self.kind]


class Columns(NamedTuple):
    """A block's sums and slope. Sums are over the columns that are here: with a sharded vocabulary, over one shard."""

    value: Tensor  # [rows], D
    slope: Tensor  # [rows, columns], a, or S·a where `weighted`; to be multiplied by `factor`
    centre: Tensor  # [rows], Σ S·a
    factor: float
    weighted: bool = False

    def gradient(self, student: Tensor, centre: Tensor) -> Tensor:
        """S·(a - centre), but for the factor, in the slope's place."""
        if self.weighted:
            return self.slope.addcmul_(student, centre[:, None], value=-1)
        return self.slope.sub_(centre[:, None]).mul_(student)


class Scratch(NamedTuple):
    """Four buffers of the block's shape. Their contents are of no interest before and after."""

    e: Tensor
    y: Tensor
    h: Tensor
    b: Tensor
    sums: torch.dtype | None = None  # of sums over columns; None: the block's

    def dot(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """Σ a·b [rows]. The products go to `out`, which torch.linalg.vecdot would allocate: on a CPU the page faults of
        that cost more than the arithmetic."""
        return torch.mul(a, b, out=out).sum(-1, dtype=self.sums)


def columns(divergence: Divergence, student: Tensor, teacher: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """Value and slope of `divergence` for a block.

    student, teacher: [rows, columns] probabilities. log_ratio: log teacher - log student, finite, computed from the
        logits and not from the probabilities. `teacher`, `log_ratio` and the scratch are overwritten, `student` is not.
    """
    kind, w = divergence.form
    if kind in ('forward_kl', 'reverse_kl'):
        log_ratio.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    larger = torch.maximum(student, teacher, out=teacher)
    _exponents(log_ratio, scratch)
    return _FORMS[kind](w, student, larger, log_ratio, scratch)


def _exponents(log_ratio: Tensor, scratch: Scratch) -> None:
    """E in `e`, y in `y`."""
    torch.abs(log_ratio, out=scratch.e).neg_()
    _expm1(scratch.e, out=scratch.y)


def _expm1(x: Tensor, out: Tensor) -> Tensor:
    """exp(x) - 1, to the last bits near 0 too; `out` may be x. torch.compile would make it exp(x) - 1 (torch
    2.13 on a CPU), where a d of 1e-7 is lost: there the series is spelled out."""
    if not torch.compiler.is_compiling():
        return torch.expm1(x, out=out)
    series = torch.ones_like(x)
    for n in range(8, 1, -1):
        series = 1 + x * (1 / n) * series
    return out.copy_(torch.where(x.abs() < 0.35, x * series, x.exp() - 1))


def _excess(x: Tensor) -> Tensor:
    """exp(x) - 1 - x, to the last bits near 0 too, where |x| < 1/2; elsewhere nothing of use."""
    x = x.clamp(-0.5, 0.5)
    series = torch.ones_like(x)
    for n in range(16 if x.dtype == torch.float64 else 9, 2, -1):
        series.mul_(x).mul_(1 / n).add_(1)
    return series.mul_(x.square_()).mul_(0.5)


def _teacher_larger(log_ratio: Tensor, out: Tensor) -> Tensor:
    """1 where T > S, else 0, as numbers: columns are selected by torch.lerp, because torch.where is slow on a CPU."""
    return torch.gt(log_ratio, 0, out=out)


def _plain_near_and_far(scratch: Scratch) -> tuple[Tensor, Tensor]:
    """near in `h`, far in `e`, as at the top of this file; `y` stays."""
    near = torch.sub(scratch.y, scratch.e, out=scratch.h)
    far = scratch.e.mul_(scratch.y).sub_(near)
    return near.relu_(), far.relu_()


def _forward_kl(w: float, student: Tensor, larger: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """KL(T‖S): near where T > S, else far.

    Slope: a_v = -T_v/S_v, unbounded; but S·a - S·ΣS·a = S - T, which is ±P·y and not a difference of two rounded
    numbers. Its sum is 0, but for an error of the normalisers that d, and so all columns, share: S times that sum is
    taken off.
    """
    teacher_larger = _teacher_larger(log_ratio, scratch.b)
    near, far = _plain_near_and_far(scratch)
    value = scratch.dot(larger, torch.lerp(far, near, teacher_larger, out=far), far)
    gradient = scratch.y.mul_(larger).mul_(teacher_larger.mul_(2).sub_(1))
    return Columns(value, gradient, gradient.sum(-1, dtype=scratch.sums), 1.0, weighted=True)


def _reverse_kl(w: float, student: Tensor, larger: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """KL(S‖T): far where T > S, else near.

    Slope: ∂/∂S_v S·log(S/T) = -d + 1, so a = -d.
    """
    teacher_larger = _teacher_larger(log_ratio, scratch.b)
    near, far = _plain_near_and_far(scratch)
    value = scratch.dot(larger, torch.lerp(near, far, teacher_larger, out=far), far)
    return Columns(value, log_ratio, scratch.dot(student, log_ratio, far), -1.0)


def _log_mixture(w: float, log_ratio: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """l = log(M/S) and m = log(M/T), in `h` and `b` or the other way round; `e` and `y` are overwritten."""
    e, y, h, b = scratch.e, scratch.y, scratch.h, scratch.b
    if w <= 0.5:  # e: d, as far as its exponential is a number; what is beyond is added to the logarithm
        torch.clamp(log_ratio, max=_MAX_EXPONENT, out=e)
        torch.sub(log_ratio, e, out=y)
    else:
        torch.neg(log_ratio, out=e).clamp_(max=_MAX_EXPONENT)
        torch.add(log_ratio, e, out=y).neg_()
    _expm1(e, out=h).mul_(min(w, 1 - w)).log1p_()
    torch.sub(h, e, out=b)
    h.add_(y)
    return (h, b) if w <= 0.5 else (b, h)


def _shares(log_ratio: Tensor, function, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """function(min(-d, 0)) and function(min(d, 0)), in `e` and `y`: s and t for exp, s - 1 and t - 1 for expm1."""
    torch.neg(log_ratio, out=scratch.e).clamp_(max=0)
    torch.clamp(log_ratio, max=0, out=scratch.y)
    return function(scratch.e, out=scratch.e), function(scratch.y, out=scratch.y)


def _jsd(w: float, student: Tensor, larger: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """β·KL(T‖M) + (1-β)·KL(S‖M), w = β. The terms in s - t cancel: -P·(β·t·m + (1-β)·s·l).

    Slope: ∂/∂S_v = -β(1-β)T/M + (1-β)(log(S/M) + 1 - (1-β)S/M) = (1-β)·log(S_v/M_v), so a = -(1-β)·l.
    """
    over_s, over_t = _log_mixture(w, log_ratio, scratch)
    s, t = _shares(log_ratio, torch.exp, scratch)
    column = t.mul_(over_t).mul_(-w).sub_(s.mul_(over_s).mul_(1 - w)).relu_()
    value = scratch.dot(larger, column, column)
    return Columns(value, over_s, scratch.dot(student, over_s, column), w - 1.0)


def _skew_forward_kl(w: float, student: Tensor, larger: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """KL(T‖M), w = α.

    Slope: ∂/∂S_v = -(1-α)·T/M. From this its value at T = S is taken: -(1-α)(T/M - 1) = -(1-α)²(T-S)/M. With
    α(T-S) = M - S, (T-S)/M = (1 - e^-l)/α, so a = (1-α)²/α · expm1(-l).
    """
    over_s, over_t = _log_mixture(w, log_ratio, scratch)
    less_s, less_t = _shares(log_ratio, _expm1, scratch)
    column = less_s.sub_(less_t).mul_(1 - w)
    t = torch.clamp(log_ratio, max=0, out=less_t).exp_()
    column = _column(1 - w, column, t, over_t)
    value = scratch.dot(larger, column, column)
    slope = over_s.neg_()
    _expm1(slope, out=slope)
    return Columns(value, slope, scratch.dot(student, slope, column), (1 - w) ** 2 / w)


def _skew_reverse_kl(w: float, student: Tensor, larger: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """KL(S‖M), M = α·S + (1-α)·T, w = 1-α.

    Slope: ∂/∂S_v = log(S/M) + 1 - α·S/M. From this its value at T = S is taken:
    a = -l - α(e^-l - 1) = -(l + α·expm1(-l)) = -(w·l + α·(e^-l - 1 + l)).
    """
    over_s, over_t = _log_mixture(w, log_ratio, scratch)
    less_s, less_t = _shares(log_ratio, _expm1, scratch)
    column = less_t.sub_(less_s).mul_(w)
    s = torch.neg(log_ratio, out=less_s).clamp_(max=0).exp_()
    column = _column(w, column, s, over_s)
    value = scratch.dot(larger, column, column)
    step = torch.neg(over_s, out=over_t)
    if w < _SLIGHT:
        excess = torch.where(step.abs() < 0.5, _excess(step), _expm1(step, out=log_ratio).add_(over_s))
        slope = over_s.mul_(w).add_(excess.mul_(1 - w))
    else:
        slope = over_s.add_(_expm1(step, out=step).mul_(1 - w))
    return Columns(value, slope, scratch.dot(student, slope, column), -1.0)


def _column(weight: float, linear: Tensor, share: Tensor, log: Tensor) -> Tensor:
    """linear - share·log in the place of `linear`: the column of a KL over P, for a mixture of which the other side is `weight`.
    share is the KL's first argument over P, log that of M over it, linear share·(e^log - 1); `share` is overwritten."""
    if weight >= _SLIGHT:
        return linear.sub_(share.mul_(log)).relu_()
    near = _excess(log).mul_(share)
    return linear.copy_(torch.where(log.abs() < 0.5, near, linear.sub(share.mul_(log))))


def _tvd(w: float, student: Tensor, larger: Tensor, log_ratio: Tensor, scratch: Scratch) -> Columns:
    """½Σ|T - S| = -½ΣP·y. Slope: a = -½·sign(T - S); at T = S the subgradient 0."""
    value = scratch.dot(larger, scratch.y, scratch.y).mul_(-0.5)
    slope = torch.sign(log_ratio, out=log_ratio)
    return Columns(value, slope, scratch.dot(student, slope, scratch.y), -0.5)


_FORMS = {
    'forward_kl': _forward_kl,
    'reverse_kl': _reverse_kl,
    'jsd': _jsd,
    'skew_forward_kl': _skew_forward_kl,
    'skew_reverse_kl': _skew_reverse_kl,
    'tvd': _tvd,
}
