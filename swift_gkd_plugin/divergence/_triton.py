"""The elementwise part of a chunk on a GPU: three kernels over the two blocks of logits.

    normalisers   one sweep: largest logit and sum of exponentials of both sides, and what else needs only the logits
    value         one sweep: D, the slope's centre Σ S·a, the detailed statistics
    gradient      one sweep: S·(a - Σ S·a), in place of the student's logits, or in half precision elsewhere

The centre needs a whole row before the first column of its gradient can be written, hence a sweep of its own; a group's
reductions sit between the sweeps. One program per row (per row and block of columns in the last one), fp32 throughout.
Rows lie `stride` numbers apart, on a GPU a multiple of 64 (`memory.Rows`). What is there beyond the columns is read and
written too, and counts for nothing: masks that end at an odd column would make one load of four numbers four loads.
The kernels are started on the device of their tensors, which need not be the current one.
The mathematics is that of `kinds.py`, whose notation is used here, column by column instead of pass by pass.
"""

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kinds import MAX_LOG_RATIO, Divergence

logger = logging.getLogger(__name__)

_KINDS = {'forward_kl': 0, 'reverse_kl': 1, 'jsd': 2, 'skew_forward_kl': 3, 'skew_reverse_kl': 4, 'tvd': 5}
# Eight columns a thread: the sweeps of a JSD take at most 52 registers (ptxas, sm_90), so that four rows are in flight on
# each multiprocessor. With 4096 columns and 4 warps it would be 194 and two rows.
_BLOCK = 2048
_WARPS = 8


def _small(w: float) -> int:
    """The kernels' SMALL."""
    return 1 if w < 1 / 16 else 2 if w > 15 / 16 else 0


@triton.jit
def _expm1(x):
    """exp(x) - 1 to fp32's precision also near 0, where exp(x) rounds to 1; and exp(x)."""
    p = 1 + x * 0.125
    p = 1 + x * 0.14285714285714285 * p
    p = 1 + x * 0.16666666666666666 * p
    p = 1 + x * 0.2 * p
    p = 1 + x * 0.25 * p
    p = 1 + x * 0.3333333333333333 * p
    p = 1 + x * 0.5 * p
    power = tl.exp(x)
    return tl.where(tl.abs(x) < 0.35, x * p, power - 1), power


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1, as 2·atanh(x / (2 + x)) near 0."""
    s = x / (2 + x)
    q = s * s
    p = 0.1111111111111111 + q * (0.09090909090909091 + q * 0.07692307692307693)
    p = 1 + q * (0.3333333333333333 + q * (0.2 + q * (0.14285714285714285 + q * p)))
    return tl.where(tl.abs(x) < 0.5, 2 * s * p, tl.log(1 + x))


@triton.jit
def _plain(e, y):
    """near and far of the KL between S and T themselves."""
    near = tl.maximum(y - e, 0.0)
    return near, tl.maximum(e * y - (y - e), 0.0)


@triton.jit
def _column(log_s, log_t, d, w, rest, KIND: tl.constexpr, SMALL: tl.constexpr):
    """(S, column of D, slope or S·slope): see the docstrings of kinds.py. S·slope for the forward KL only. rest: 1 - w, of
    which a w near 1 would leave little. SMALL: 1 where w is small, 2 where 1 - w is, else 0: then log(1 + x) cancels nowhere,
    and cheaper terms do."""
    student = tl.exp(log_s)
    if KIND < 2:
        d = tl.minimum(tl.maximum(d, -10000.0), 10000.0)
    larger = tl.exp(tl.maximum(log_s, log_t))
    teacher_larger = d > 0
    e = -tl.abs(d)
    y, smaller = _expm1(e)
    if KIND == 5:
        return student, -0.5 * larger * y, tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0))
    if KIND == 0:
        near, far = _plain(e, y)
        value = larger * tl.where(teacher_larger, near, far)
        return student, value, larger * y * tl.where(teacher_larger, 1.0, -1.0)
    if KIND == 1:
        near, far = _plain(e, y)
        return student, larger * tl.where(teacher_larger, far, near), -d
    if SMALL == 0:
        h = _log1p(tl.where(teacher_larger, rest, w) * y)
        over_s = h + tl.maximum(d, 0.0)
        over_t = h + tl.maximum(-d, 0.0)
    else:
        difference = d if SMALL == 1 else -d
        exponent = tl.minimum(difference, 80.0)
        grown = tl.where(exponent > 0, -y / tl.maximum(smaller, 1.8048514e-35), y)  # expm1(exponent); the number is exp(-80)
        h = _log1p((w if SMALL == 1 else rest) * grown)
        over_s = h + (difference - exponent) if SMALL == 1 else h - exponent
        over_t = h - exponent if SMALL == 1 else h + (difference - exponent)
    s = tl.where(teacher_larger, smaller, 1.0)
    t = tl.where(teacher_larger, 1.0, smaller)
    if KIND == 2:
        return student, larger * tl.maximum(-(w * t * over_t + rest * s * over_s), 0.0), -rest * over_s
    s_minus_t = tl.where(teacher_larger, y, -y)
    step, _ = _expm1(-over_s)
    if KIND == 3:
        value = larger * tl.maximum(rest * s_minus_t - t * over_t, 0.0)
        return student, value, rest * rest / w * step
    return student, larger * tl.maximum(-w * s_minus_t - s * over_s, 0.0), -(over_s + rest * step)


@triton.jit
def _normalise_kernel(
    z,
    base,
    top,
    total,
    label_total,
    best,
    columns,
    stride,
    temperature,
    ADD: tl.constexpr,
    LABELS: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    m = tl.full((), -3e38, tl.float32)
    s = tl.full((), 0.0, tl.float32)
    at_one = tl.full((), 0.0, tl.float32)
    index = tl.full((), 0, tl.int32)
    for first in range(0, columns, BLOCK):
        place = first + offsets
        x = tl.load(z + start + place, mask=place < stride, other=0.0)
        if ADD:
            x += tl.load(base + start + place, mask=place < stride, other=0.0)
        x = tl.where(place < columns, x, -3e38)
        block_m = tl.max(x, 0)
        if BEST:
            index = tl.where(block_m > m, first + tl.argmax(x, 0), index)
        new = tl.maximum(m, block_m)
        s = s * tl.exp(m - new) + tl.sum(tl.exp(x - new), 0)
        if LABELS:
            at_one = at_one * tl.exp((m - new) * temperature) + tl.sum(tl.exp((x - new) * temperature), 0)
        m = new
    tl.store(top + row, m)
    tl.store(total + row, s)
    if LABELS:
        tl.store(label_total + row, at_one)
    if BEST:
        tl.store(best + row, index)


@triton.jit
def _both(zs, zt, place, mask, DIFFERENCE: tl.constexpr):
    """The student's logits, the teacher's, and the latter minus the former; zt holds the second or the third."""
    s = tl.load(zs + place, mask=mask, other=-1e30)
    t = tl.load(zt + place, mask=mask, other=0.0 if DIFFERENCE else -1e30)
    if DIFFERENCE:
        return s, s + t, t
    return s, t, t - s


@triton.jit
def _value_kernel(
    zs,
    zt,
    norm_s,
    norm_t,
    shift,
    out,
    rows,
    columns,
    stride,
    w,
    rest,
    DIFFERENCE: tl.constexpr,
    KIND: tl.constexpr,
    SMALL: tl.constexpr,
    DETAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    lse_s, lse_t, c = tl.load(norm_s + row), tl.load(norm_t + row), tl.load(shift + row)
    value = tl.zeros((BLOCK,), tl.float32)
    centre = tl.zeros((BLOCK,), tl.float32)
    forward = tl.zeros((BLOCK,), tl.float32)
    reverse = tl.zeros((BLOCK,), tl.float32)
    entropy_s = tl.zeros((BLOCK,), tl.float32)
    entropy_t = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        mask = first + offsets < columns
        s, t, d = _both(zs, zt, start + first + offsets, first + offsets < stride, DIFFERENCE)
        d -= c
        student, column, slope = _column(s - lse_s, t - lse_t, d, w, rest, KIND, SMALL)
        value += tl.where(mask, column, 0.0)
        centre += tl.where(mask, slope if KIND == 0 else student * slope, 0.0)
        if DETAIL:
            _, f, _ = _column(s - lse_s, t - lse_t, d, w, rest, 0, SMALL)
            _, r, _ = _column(s - lse_s, t - lse_t, d, w, rest, 1, SMALL)
            forward += tl.where(mask, f, 0.0)
            reverse += tl.where(mask, r, 0.0)
            entropy_s -= tl.where(mask, student * (s - lse_s), 0.0)
            entropy_t -= tl.where(mask, tl.exp(t - lse_t) * (t - lse_t), 0.0)
    tl.store(out + row, tl.sum(value, 0))
    tl.store(out + rows + row, tl.sum(centre, 0))
    if DETAIL:
        tl.store(out + 2 * rows + row, tl.sum(forward, 0))
        tl.store(out + 3 * rows + row, tl.sum(reverse, 0))
        tl.store(out + 4 * rows + row, tl.sum(entropy_s, 0))
        tl.store(out + 5 * rows + row, tl.sum(entropy_t, 0))


@triton.jit
def _gradient_kernel(
    zs,
    zt,
    norm_s,
    norm_t,
    shift,
    centre,
    weight,
    label_norm,
    label_weight,
    label_column,
    out,
    columns,
    stride,
    w,
    rest,
    temperature,
    softcap,
    DIFFERENCE: tl.constexpr,
    KIND: tl.constexpr,
    SMALL: tl.constexpr,
    LABELS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < stride
    start = row.to(tl.int64) * stride
    s, t, d = _both(zs, zt, start + place, inside, DIFFERENCE)
    student, _, slope = _column(s - tl.load(norm_s + row), t - tl.load(norm_t + row), d - tl.load(shift + row), w, rest, KIND, SMALL)
    c = tl.load(centre + row)
    gradient = (slope - student * c if KIND == 0 else student * (slope - c)) * tl.load(weight + row)
    if LABELS:
        one_hot = tl.where(place == tl.load(label_column + row), 1.0, 0.0)
        gradient += (tl.exp(s * temperature - tl.load(label_norm + row)) - one_hot) * tl.load(label_weight + row)
    if SOFTCAP:
        tanh = s * (temperature / softcap)
        gradient *= 1 - tanh * tanh
    tl.store(out + start + place, gradient.to(out.dtype.element_ty), mask=inside)


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels can be compiled and started on a device; a warning, once, where they can't."""
    reason = 'a kernel gives wrong numbers'
    try:
        logits = torch.zeros(1, 3, device=device)
        if float(normalise(logits, logits, False, 1.0, False, False)[0][1]) == 3:
            return True
    except Exception as error:  # whatever a compiler, Python's headers or a driver can lack
        reason = (str(error).strip() or repr(error)).splitlines()[0]
    logger.warning('Triton does not work here (%s): the divergence is computed without it, right but slower', reason)
    return False


def normalise(zs: Tensor, zt: Tensor, difference: bool, temperature: float, labels: bool, best: bool) -> list[tuple[Tensor, ...]]:
    """For both sides: largest logit, Σ exp(z - largest), the same sum at temperature 1 (of the student, where `labels`),
    the column of the largest logit (where `best`); each [rows]. difference: zt holds the teacher's logits minus zs, here
    and below."""
    out = []
    for z in (zs, zt):
        top, total, at_one = torch.empty(3, len(z), dtype=torch.float32, device=z.device)
        index = torch.empty(len(z), dtype=torch.int32, device=z.device)
        add = difference and z is zt
        which = (add, labels and temperature != 1 and not out, best, _BLOCK)
        with torch.cuda.device_of(z):
            _normalise_kernel[(len(z),)](z, zs, top, total, at_one, index, z.shape[1], z.stride(0), temperature, *which, num_warps=_WARPS)
        out.append((top, total, at_one if which[1] else total, index.long()))
    return out


def sums(
    divergence: Divergence, zs: Tensor, zt: Tensor, difference: bool, norm_s: Tensor, norm_t: Tensor, shift: Tensor, detail: bool
) -> Tensor:
    """[2 or 6, rows]: value, centre; with detail forward KL, reverse KL, the student's and the teacher's entropy."""
    kind, w = divergence.form
    out = torch.empty(6 if detail else 2, len(zs), dtype=torch.float32, device=zs.device)
    which = (difference, _KINDS[kind], _small(w), detail, _BLOCK)
    widths = zs.shape[1], zs.stride(0)
    with torch.cuda.device_of(zs):
        _value_kernel[(len(zs),)](zs, zt, norm_s, norm_t, shift, out, len(zs), *widths, w, 1 - w, *which, num_warps=_WARPS)
    return out


def gradient(
    divergence: Divergence,
    zs: Tensor,
    zt: Tensor,
    difference: bool,
    norm_s: Tensor,
    norm_t: Tensor,
    shift: Tensor,
    centre: Tensor,
    weight: Tensor,
    labels: tuple[Tensor, Tensor, Tensor] | None,
    temperature: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Fill out [rows, columns], which may be zs, with weight·∂D/∂zs, times the softcap's derivative. labels: the
    log-sum-exp at temperature 1, the cross-entropy's weight and the label's column, -1 for none here, each [rows]: the
    gradient of the cross-entropy is added."""
    kind, w = divergence.form
    label_norm, label_weight, label_column = labels or (weight, weight, weight)
    grid = (len(zs), triton.cdiv(zs.shape[1], _BLOCK))
    with torch.cuda.device_of(zs):
        _gradient_kernel[grid](
            zs,
            zt,
            norm_s,
            norm_t,
            shift,
            centre,
            weight,
            label_norm,
            label_weight,
            label_column,
            out,
            zs.shape[1],
            zs.stride(0),
            w,
            1 - w,
            temperature,
            softcap or 1.0,
            difference,
            _KINDS[kind],
            _small(w),
            labels is not None,
            bool(softcap),
            _BLOCK,
            num_warps=_WARPS,
        )


assert MAX_LOG_RATIO == 10000.0, 'the kernels spell this number out'
