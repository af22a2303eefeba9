"""The Triton kernels of `_triton.py`: one program per row of logits, or per row and block of columns; fp32 throughout.

The mathematics is that of `kinds.py`, whose notation is used here, column by column instead of pass by pass, and in the
fewest instructions: on Hopper a sweep has time for about nine per byte that it moves.

**Near and far.** Where |d| < NEAR all is a polynomial in d that is relatively exact, so that nothing cancels where two models
are close: D's column is a probability times d²·V(d), its slope d·A(d). `_triton.py` makes V and A. Farther away the terms are
of the size of their sum, and the definitions do, from S, T and one exponential and one logarithm of their ratio.

**Exponentials.** In base two, by the instruction that the GPU has for them, wrong by 2⁻²² at most. Differences of logits are
taken first: a logit of 1e30 is no more than the largest.

Rows lie `stride` numbers apart, on a GPU a multiple of 64 (`memory.Rows`). All blocks but a row's last are worked on without
masks; there, what lies between the columns and the stride is read and written too, and counts for nothing: masks that end at
an odd column would make one load of four numbers four loads.
"""

import torch
import triton
import triton.language as tl

NEAR = 0.75
_NEAR = tl.constexpr(NEAR)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LIMIT = tl.constexpr(10000.0)  # kinds.MAX_LOG_RATIO
_NOTHING = tl.constexpr(-3e38)  # below any logit
_SLIGHT = tl.constexpr(1 / 8)  # kinds._SLIGHT

# Triton's own exponential takes care of results that are no normal numbers: four instructions for one. Its interpreter has no
# inline assembly, and other GPUs have another one.
if triton.knobs.runtime.interpret or torch.version.hip:

    @triton.jit
    def _exp2(x):
        return tl.exp2(x)

    @triton.jit
    def _log2(x):
        return tl.log2(x)

    @triton.jit
    def _reciprocal(x):
        return 1.0 / x

    @triton.jit
    def _maxima(x, y):
        return tl.max(x, 0), tl.max(y, 0)

    @triton.jit
    def _totals(x, y):
        return tl.sum(x, 0), tl.sum(y, 0)

else:

    @triton.jit
    def _larger(x, y, a, b):
        return tl.maximum(x, a), tl.maximum(y, b)

    @triton.jit
    def _plus(x, y, a, b):
        return x + a, y + b

    @triton.jit
    def _maxima(x, y):
        return tl.reduce((x, y), 0, _larger)

    @triton.jit
    def _totals(x, y):
        return tl.reduce((x, y), 0, _plus)

    @triton.jit
    def _exp2(x):
        return tl.inline_asm_elementwise('ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _log2(x):
        return tl.inline_asm_elementwise('lg2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def _reciprocal(x):
        return tl.inline_asm_elementwise('rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1)


# In fp64 Triton's own do; with an `else`, for the compiler goes on after a `return`.


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return _exp2(x * _LOG2E)


@triton.jit
def _log(x):
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        return _log2(x) * _LN2


@triton.jit
def _one_over(x):
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        return _reciprocal(x)


@triton.jit
def _at_least_0(x):
    """And NaN where x is: a run is to see it and stop."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _polynomial(x, C: tl.constexpr):
    """Σ C[i]·xⁱ."""
    N: tl.constexpr = len(C)
    p = x * C[N - 1] + C[N - 2]
    for i in tl.static_range(3, N + 1):
        p = p * x + C[N - i]
    return p


@triton.jit
def _bend(s):
    """log(1 + x) / s - 2 of s = x / (2 + x), for |x| < 1/2. Hence x - log(1 + x) = s·(x - bend)."""
    q = s * s
    p = 0.2857142857142857 + q * (0.2222222222222222 + q * 0.18181818181818182)
    return q * (0.6666666666666666 + q * (0.4 + q * p))


@triton.jit
def _log1p(x):
    """log(1 + x) for x > -1/8, as 2·atanh(x / (2 + x)) near 0."""
    s = x * _one_over(2 + x)
    return tl.where(tl.abs(x) < 0.5, s * (2 + _bend(s)), _log(1 + x))


@triton.jit
def _mixture(d, W: tl.constexpr, REST: tl.constexpr):
    """Where |d| >= NEAR, or in fp64: log(M/S), log(M/T) and (S - T)/M. The smaller weight, where it is small indeed, is that of an
    exponential that may be large: 1 - W·(1 - e^d) would leave nothing of a W of 1e-6."""
    if W < 1 / 16 or REST < 1 / 16:
        first: tl.constexpr = W < 1 / 16
        small: tl.constexpr = W if first else REST
        difference = d if first else -d
        exponent = tl.minimum(difference, 80.0)
        grown = _exp(exponent) - 1
        h = _log1p(small * grown)
        ratio = grown * _one_over(1 + small * grown)
        beyond = h + (difference - exponent)
        return (beyond, h - exponent, -ratio) if first else (h - exponent, beyond, ratio)
    y = _exp(-tl.abs(d)) - 1
    m = tl.where(d > 0, REST, W) * y + 1  # M/P
    h = _log(m)
    return h + tl.maximum(d, 0.0), h + tl.maximum(-d, 0.0), tl.where(d > 0, y, -y) * _one_over(m)


@triton.jit
def _slight(first, other, d, SMALL: tl.constexpr):
    """As for _mixture: the column of KL(first‖M), where SMALL is the weight of `other` in M, and minus its slope where `first` is S;
    d = log(other/first). As in kinds.py, but with M/first = 1 + x and, where that is not far from 1, x - log(1 + x) at once."""
    exponent = tl.minimum(d, 80.0)
    x = SMALL * (_exp(exponent) - 1)
    s, y = x * _one_over(2 + x), x * _one_over(1 + x)  # y = 1 - first/M
    bend, log = _bend(s), _log(1 + x)
    column = tl.where(x < 0.5, first * s * (x - bend), SMALL * (other - first) - first * log)
    return column, tl.where(x < 0.5, s * (y + bend), log + (d - exponent) - y) + SMALL * y


@triton.jit
def _column(log_s, log_t, d, KIND: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, V: tl.constexpr, A: tl.constexpr):
    """(S, column of D, slope or S·slope): see the docstrings of kinds.py. S·slope for the forward KL only. REST: 1 - W, of
    which a W near 1 would leave little."""
    S, T = _exp(log_s), _exp(log_t)
    near = tl.abs(d) < _NEAR
    if KIND == 'forward_kl':
        d = tl.minimum(tl.maximum(d, -_LIMIT), _LIMIT)
        value = tl.where(near, T * (d * d) * _polynomial(d, V), T * d + (S - T))
        return S, value, tl.where(near, -S * d * _polynomial(d, A), S - T)
    if KIND == 'reverse_kl':
        d = tl.minimum(tl.maximum(d, -_LIMIT), _LIMIT)
        return S, tl.where(near, S * (d * d) * _polynomial(d, V), (T - S) - S * d), -d
    if KIND == 'tvd':
        value = tl.where(near, tl.abs(S * d * _polynomial(d, A)), tl.abs(T - S)) * 0.5
        return S, value, tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0))
    if KIND == 'jsd' and W == 0.5:  # symmetrical: log(M/S) - d/2 = log cosh(d/2), and it and D's column over M are even
        square = d * d
        h = _log2(_exp(-tl.abs(d)) + 1) * _LN2 - _LN2
        over_s = tl.where(near, d * 0.5 + square * _polynomial(square, A), h + tl.maximum(d, 0.0))
        far = (S + T) * h + tl.abs(d) * tl.minimum(S, T)
        return S, tl.where(near, (S + T) * (square * _polynomial(square, V)), -far) * 0.5, over_s * -0.5
    if KIND == 'skew_reverse_kl' and W < _SLIGHT:
        column, falling = _slight(S, T, d, W)
        return S, tl.where(near, S * (d * d) * _polynomial(d, V), column), tl.where(near, d * _polynomial(d, A), -falling)
    over_s, over_t, ratio = _mixture(d, W, REST)
    linear = d * _polynomial(d, A)
    if KIND == 'skew_forward_kl' and REST < _SLIGHT:
        column, _ = _slight(T, S, -d, REST)
        return S, tl.where(near, T * (d * d) * _polynomial(d, V), column), tl.where(near, linear, REST * REST * ratio)
    if KIND == 'jsd':
        value = tl.where(near, (W * T + REST * S) * ((d * d) * _polynomial(d, V)), -(W * T * over_t + REST * S * over_s))
        return S, value, tl.where(near, linear, -REST * over_s)
    if KIND == 'skew_forward_kl':
        value = tl.where(near, T * (d * d) * _polynomial(d, V), _at_least_0(REST * (S - T) - T * over_t))
        return S, value, tl.where(near, linear, REST * REST * ratio)
    value = tl.where(near, S * (d * d) * _polynomial(d, V), _at_least_0(W * (T - S) - S * over_s))
    return S, value, tl.where(near, linear, -(over_s + REST * W * ratio))


# ---- the sweeps ----


@triton.jit
def _block_of(z, base, place, limit, other, ADD: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(z + place, mask=limit, other=other)
        return x + tl.load(base + place, mask=limit, other=0.0) if ADD else x
    x = tl.load(z + place)
    return x + tl.load(base + place) if ADD else x


@triton.jit
def _take_in(x, first, offsets, m, s, of_labels, mean, index, scale, SCALED: tl.constexpr, DETAIL: tl.constexpr):
    """A block's logits into each lane's running maximum m and sum s."""
    new = tl.maximum(m, x)
    if SCALED:
        of_labels = of_labels * _exp((m - new) * scale) + _exp((x - new) * scale)
    if DETAIL:
        index = tl.where(x > m, first + offsets, index)
    shrunk, p = _exp(m - new), _exp(x - new)
    if DETAIL:  # Σ p·(x - m); a lane's first maximum is infinitely higher than none
        mean = shrunk * (mean + tl.maximum(m - new, -1000.0) * s) + p * tl.maximum(x - new, -1000.0)
    return new, s * shrunk + p, of_labels, mean, index


@triton.jit
def _scale_of(label_scale, row, PER_ROW: tl.constexpr):
    """What brings a row's logits to its label's temperature: of all rows the same, or one of a tensor's."""
    if PER_ROW:
        return tl.load(label_scale + row)
    else:
        return label_scale


# Rows of logits always start at a multiple of 16 bytes, and kernels are compiled for that; `out` is such rows in the sweeps.
_ROWS = {'z', 'base', 'zs', 'zt', 'stride'}


def _jit(kernel):
    """Compiled once for all numbers of tokens and columns: neither widths and ids are looked at, nor where in memory a token's
    numbers are."""
    code = kernel.__code__
    names = [name for name in code.co_varnames[: code.co_argcount] if not name.isupper()]
    rows = _ROWS | ({'out'} if not {'out_stride', 'ERASE'} & set(code.co_varnames) else set())
    widths = {'columns', 'first_id', 'out_stride', 'norms_stride', 'sums_stride', 'rows', 'k'}
    return triton.jit(
        kernel,
        do_not_specialize=[name for name in names if name in widths],
        do_not_specialize_on_alignment=[name for name in names if name not in rows],
    )


@_jit
def normalise_kernel(
    z,
    base,
    lse,
    label_lse,
    top,
    best,
    entropy,
    columns,
    stride,
    label_scale,
    ADD: tl.constexpr,
    LABELS: tl.constexpr,
    SCALED: tl.constexpr,
    PER_ROW: tl.constexpr,
    DETAIL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """LABELS: label_lse too, SCALED: which is another sum than lse, PER_ROW: of each row at a temperature of its own."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), _NOTHING, tl.float32)
    s, of_labels, mean = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    scale = _scale_of(label_scale, row, PER_ROW)
    whole = columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        x = _block_of(z, base, start + first + offsets, None, None, ADD, False)
        m, s, of_labels, mean, index = _take_in(x, first, offsets, m, s, of_labels, mean, index, scale, SCALED, DETAIL)
    place = whole + offsets
    x = _block_of(z, base, start + place, place < stride, 0.0, ADD, True)
    x = tl.where(place < columns, x, _NOTHING)
    m, s, of_labels, mean, index = _take_in(x, whole, offsets, m, s, of_labels, mean, index, scale, SCALED, DETAIL)

    highest = tl.max(m, 0)
    counts = m > _NOTHING
    shrunk = tl.where(counts, _exp(m - highest), 0.0)
    total = tl.sum(s * shrunk, 0)
    norm = highest.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(lse + row, norm)
    if LABELS and not SCALED:
        tl.store(label_lse + row, norm)
    if SCALED:
        of_labels = tl.sum(tl.where(counts, of_labels * _exp((m - highest) * scale), 0.0), 0)
        tl.store(label_lse + row, highest.to(tl.float64) * scale + tl.log(of_labels.to(tl.float64)))
    if DETAIL:
        tl.store(top + row, highest)
        tl.store(best + row, tl.min(tl.where(m == highest, index, 2147483647), 0))
        mean = tl.sum(tl.where(counts, shrunk * (mean + (m - highest) * s), 0.0), 0) / total
        tl.store(entropy + row, tl.log(total.to(tl.float64)) - mean)


@triton.jit
def _both(zs, zt, place, limit, DIFFERENCE: tl.constexpr, MASKED: tl.constexpr):
    """The student's logits, the teacher's, and the latter minus the former; zt holds the second or the third."""
    s = _block_of(zs, zs, place, limit, -1e30, False, MASKED)
    t = _block_of(zt, zt, place, limit, 0.0 if DIFFERENCE else -1e30, False, MASKED)
    if DIFFERENCE:
        return s, s + t, t
    return s, t, t - s


@triton.jit
def _sum_up(s, t, d, lse_s, lse_t, inside, sums, KIND: tl.constexpr, W: tl.constexpr, REST: tl.constexpr, V: tl.constexpr, A: tl.constexpr):
    """A block's columns into each lane's sums of the value and the slope."""
    value, centre = sums
    student, column, slope = _column(s - lse_s, t - lse_t, d, KIND, W, REST, V, A)
    if KIND != 'forward_kl':
        slope = student * slope
    if inside is not None:
        column, slope = tl.where(inside, column, 0.0), tl.where(inside, slope, 0.0)
    return value + column, centre + slope


@_jit
def value_kernel(
    zs,
    zt,
    norm_s,
    norm_t,
    out,
    out_stride,
    columns,
    stride,
    KIND: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    CENTRE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """D into out[0], and with CENTRE Σ S·a into out[1]; rows of out are out_stride apart."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    lse_s, lse_t = tl.load(norm_s + row), tl.load(norm_t + row)
    shift = (lse_t - lse_s).to(tl.float32)
    lse_s, lse_t = lse_s.to(tl.float32), lse_t.to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    whole = columns // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        s, t, d = _both(zs, zt, start + first + offsets, None, DIFFERENCE, False)
        sums = _sum_up(s, t, d - shift, lse_s, lse_t, None, sums, KIND, W, REST, V, A)
    place = whole + offsets
    s, t, d = _both(zs, zt, start + place, place < stride, DIFFERENCE, True)
    sums = _sum_up(s, t, d - shift, lse_s, lse_t, place < columns, sums, KIND, W, REST, V, A)
    tl.store(out + row, tl.sum(sums[0], 0))
    if CENTRE:
        tl.store(out + out_stride + row, tl.sum(sums[1], 0))


@triton.jit
def _with_labels_and_softcap(
    gradient,
    s,
    place,
    row,
    label_lse,
    label_weight,
    label,
    first_id,
    label_scale,
    over_softcap,
    LABELS: tl.constexpr,
    PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The gradient of the cross-entropy added, times the softcap's derivative."""
    if LABELS:
        # Loaded in this order: with the norm first the compiler needs 1.3 instructions more per logit of a top-k teacher's.
        one_hot = _one_hot(place, row, label, first_id)
        norm = tl.load(label_lse + row).to(tl.float32)
        scale = _scale_of(label_scale, row, PER_ROW)
        gradient += _cross_entropy_slope(s, one_hot, norm, scale) * tl.load(label_weight + row)
    return gradient * _softcap_slope(s, over_softcap) if SOFTCAP else gradient


@triton.jit
def _one_hot(place, row, label, first_id):
    return tl.where(place == (tl.load(label + row) - first_id).to(tl.int32), 1.0, 0.0)


@triton.jit
def _cross_entropy_slope(s, one_hot, norm, scale):
    return _exp(s * scale - norm) - one_hot


@triton.jit
def _softcap_slope(s, over_softcap):
    tanh = s * over_softcap
    return 1 - tanh * tanh


@_jit
def gradient_kernel(
    zs,
    zt,
    norm_s,
    norm_t,
    centre,
    weight,
    label_lse,
    label_weight,
    label,
    out,
    stride,
    first_id,
    label_scale,
    over_softcap,
    KIND: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    LABELS: tl.constexpr,
    PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < stride
    start = row.to(tl.int64) * stride
    lse_s, lse_t = tl.load(norm_s + row), tl.load(norm_t + row)
    s, t, d = _both(zs, zt, start + place, inside, DIFFERENCE, True)
    d -= (lse_t - lse_s).to(tl.float32)
    student, _, slope = _column(s - lse_s.to(tl.float32), t - lse_t.to(tl.float32), d, KIND, W, REST, V, A)
    c, weight = tl.load(centre + row), tl.load(weight + row)
    gradient = (slope - student * c if KIND == 'forward_kl' else student * (slope - c)) * weight
    gradient = _with_labels_and_softcap(
        gradient, s, place, row, label_lse, label_weight, label, first_id, label_scale, over_softcap, LABELS, PER_ROW, SOFTCAP
    )
    tl.store(out + start + place, gradient.to(out.dtype.element_ty), mask=inside)


@_jit
def tail_gradient_kernel(
    z,
    norm,
    weight,
    label_lse,
    label_weight,
    label,
    out,
    stride,
    first_id,
    label_scale,
    over_softcap,
    TAIL: tl.constexpr,
    LABELS: tl.constexpr,
    PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight·softmax of a top-k teacher's tail, where TAIL; and the cross-entropy's gradient."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < stride
    start = row.to(tl.int64) * stride
    s = tl.load(z + start + place, mask=inside, other=-1e30)
    gradient = tl.zeros((BLOCK,), tl.float32)
    if TAIL:
        gradient = _exp(s - tl.load(norm + row).to(tl.float32)) * tl.load(weight + row)
    gradient = _with_labels_and_softcap(
        gradient, s, place, row, label_lse, label_weight, label, first_id, label_scale, over_softcap, LABELS, PER_ROW, SOFTCAP
    )
    tl.store(out + start + place, gradient.to(out.dtype.element_ty), mask=inside)


# ---- the three sweeps as one ----
#
# A row is cut into slices, one program each, which keep their logits in registers and meet twice: when the norms of all slices
# are known, and when their sums are. A logit is read once, and the gradient is written. Which slice a program works on it learns
# from a counter when it starts, not from its number: whatever order a GPU starts programs in, the slices of a row start together,
# and of all programs fewer than a row has slices ever wait for one that has not started.

_PATIENCE = tl.constexpr(1 << 24)  # looks at a counter, half a microsecond each or more


@triton.jit
def _meet(arrived, count):
    """Wait until `count` programs have come here, after which what they had written can be read; False where they never do."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem='release')
    looks = 0
    while (tl.atomic_add(arrived, 0, sem='acquire') < count) & (looks < _PATIENCE):
        looks += 1
    return looks < _PATIENCE


@triton.jit
def _note(notes, which: tl.constexpr, other, SLICES: tl.constexpr, PLACES: tl.constexpr):
    """What all slices say, from their common memory: the multiprocessor's own may have kept what was there before."""
    place = tl.arange(0, PLACES)
    return tl.load(notes + which * SLICES + place, mask=place < SLICES, other=other, cache_modifier='.cg')


@_jit
def one_load_kernel(
    zs,
    zt,
    norm_s,
    norm_t,
    sums,
    sums_stride,
    weight,
    label_lse,
    label_weight,
    label,
    out,
    notes,
    arrived,
    rows,
    columns,
    stride,
    first_id,
    label_scale,
    over_softcap,
    KIND: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    V: tl.constexpr,
    A: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    LABELS: tl.constexpr,
    TRAINED: tl.constexpr,
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SWEEP: tl.constexpr,
    SLICES: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`normalise_kernel` of both sides, `value_kernel` and `gradient_kernel`. LABELS: label_lse too, TRAINED: and the gradient of
    the cross-entropy; SCALED: at another temperature than the logits', of all rows the same.

    SWEEP: 0, or 1, 2 or 3 for what stands before the first meeting, between the two and after the second, in a launch of its own,
    for programs that run one after the other can't meet.
    notes: [rows, 7, SLICES], what the slices of a row tell each other. arrived: [rows + 1] zeros; the last counts programs.
    """
    program = tl.program_id(0)
    if SWEEP == 0:
        program = tl.atomic_add(arrived + rows, 1, sem='relaxed')
    row, slice = program // SLICES, program % SLICES
    arrived += row
    notes += row * 7 * SLICES
    place = slice * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * stride
    s, t, d = _both(zs, zt, start + place, place < stride, DIFFERENCE, True)
    if (slice + 1) * BLOCK > columns:  # beyond the columns: two equal logits without a probability
        inside = place < columns
        s, t, d = tl.where(inside, s, -1e30), tl.where(inside, t, -1e30), tl.where(inside, d, 0.0)

    if SWEEP < 2:
        m_s, m_t = _maxima(s, t)
        m_s, m_t = tl.maximum(m_s, _NOTHING), tl.maximum(m_t, _NOTHING)
        total_s, total_t = _totals(_exp(s - m_s), _exp(t - m_t))
        tl.store(notes + slice, m_s)
        tl.store(notes + SLICES + slice, m_t)
        tl.store(notes + 2 * SLICES + slice, total_s)
        tl.store(notes + 3 * SLICES + slice, total_t)
        if SCALED:
            tl.store(notes + 4 * SLICES + slice, tl.sum(_exp((s - m_s) * label_scale), 0))
    all_came = True
    if SWEEP == 0:
        all_came = _meet(arrived, SLICES)

    if SWEEP != 1:
        tops_s, tops_t = _note(notes, 0, _NOTHING, SLICES, PLACES), _note(notes, 1, _NOTHING, SLICES, PLACES)
        totals_s, totals_t = _note(notes, 2, 0.0, SLICES, PLACES), _note(notes, 3, 0.0, SLICES, PLACES)
        m_s, m_t = _maxima(tops_s, tops_t)
        total_s, total_t = _totals(totals_s * _exp(tops_s - m_s), totals_t * _exp(tops_t - m_t))
        total_of_labels, scale = total_s, 1.0
        if SCALED:
            scale = label_scale
            total_of_labels = tl.sum(_note(notes, 4, 0.0, SLICES, PLACES) * _exp((tops_s - m_s) * label_scale), 0)
        if slice == 0:
            tl.store(norm_s + row, m_s.to(tl.float64) + tl.log(total_s.to(tl.float64)))
            tl.store(norm_t + row, m_t.to(tl.float64) + tl.log(total_t.to(tl.float64)))
            if LABELS:
                tl.store(label_lse + row, m_s.to(tl.float64) * scale + tl.log(total_of_labels.to(tl.float64)))
        d -= (m_t - m_s) + tl.log(total_t / total_s)
        student, column, slope = _column(s - (m_s + tl.log(total_s)), t - (m_t + tl.log(total_t)), d, KIND, W, REST, V, A)
        if KIND != 'forward_kl':
            slope = student * slope
        # The gradient is slope - centre·student.
        if SWEEP != 3:
            value, centre = _totals(column, slope)
            tl.store(notes + 5 * SLICES + slice, tl.where(all_came, value, float('nan')))
            tl.store(notes + 6 * SLICES + slice, centre)
        factor = tl.load(weight + row)
        slope, student = slope * factor, student * factor
        if TRAINED:
            norm = m_s * scale + tl.log(total_of_labels)
            one_hot = _one_hot(place, row, label, first_id)
            slope += _cross_entropy_slope(s, one_hot, norm, label_scale) * tl.load(label_weight + row)
        if SOFTCAP:
            steepness = _softcap_slope(s, over_softcap)
            slope, student = slope * steepness, student * steepness
        if SWEEP == 0:
            all_came = _meet(arrived, 2 * SLICES) & all_came
        if SWEEP != 2:
            values, centres = _note(notes, 5, 0.0, SLICES, PLACES), _note(notes, 6, 0.0, SLICES, PLACES)
            value, centre = _totals(values, centres)
            centre = tl.where(all_came, centre, float('nan'))  # and so the gradient: a run stops there
            if slice == 0:
                tl.store(sums + row, value)
                tl.store(sums + sums_stride + row, centre)
            tl.store(out + start + place, (slope - student * centre).to(out.dtype.element_ty), mask=place < stride)


# ---- few columns of each row ----


@_jit
def take_kernel(z, ids, out, k, columns, stride, first_id, ERASE: tl.constexpr, K: tl.constexpr):
    """The logits of k ids, 0 of those that are not here; ERASE: -1e30 in their place."""
    row, entry = tl.program_id(0), tl.arange(0, K)
    column = tl.load(ids + row * k + entry, mask=entry < k, other=-1) - first_id
    here = (entry < k) & (column >= 0) & (column < columns)
    place = z + row.to(tl.int64) * stride + column
    tl.store(out + row * k + entry, tl.load(place, mask=here, other=0.0), mask=entry < k)
    if ERASE:
        tl.store(place, tl.full((K,), -1e30, tl.float32), mask=here)


@_jit
def put_kernel(values, ids, out, k, columns, stride, first_id, K: tl.constexpr):
    """The opposite."""
    row, entry = tl.program_id(0), tl.arange(0, K)
    column = tl.load(ids + row * k + entry, mask=entry < k, other=-1) - first_id
    here = (entry < k) & (column >= 0) & (column < columns)
    value = tl.load(values + row * k + entry, mask=here, other=0.0)
    tl.store(out + row.to(tl.int64) * stride + column, value.to(out.dtype.element_ty), mask=here)


@_jit
def combine_kernel(gathered, norms, rows, norms_stride, RANKS: tl.constexpr, PLACES: tl.constexpr):
    """log Σ exp over the ranks, of row program_id(0) of norms."""
    which = tl.program_id(0)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    inside = place < rows
    here = gathered + which * rows + place
    step = tl.num_programs(0) * rows
    largest = tl.load(here, mask=inside, other=0.0)
    for rank in range(1, RANKS):
        largest = tl.maximum(largest, tl.load(here + rank * step, mask=inside, other=0.0))
    total = tl.zeros((PLACES,), tl.float64)
    for rank in range(RANKS):
        total += tl.exp(tl.load(here + rank * step, mask=inside, other=0.0) - largest)
    tl.store(norms + which * norms_stride + place, largest + tl.log(total), mask=inside)


# ---- a top-k teacher's buckets: what topk.py says, in fp64 ----

_LOWEST = tl.constexpr(-1e30)  # sweeps.LOWEST_LOGIT


@triton.jit
def _logsumexp(x, one):
    """log Σ exp of a row's entries and one more."""
    top = tl.maximum(tl.max(x, 0), one)
    return top + tl.log(tl.sum(tl.exp(x - top), 0) + tl.exp(one - top))


@triton.jit
def _bucket(log_s, log_t, KIND: tl.constexpr, W: tl.constexpr, REST: tl.constexpr):
    """(S, column of D, slope or S·slope), as `_column`; fp64 has digits to spare for what is done far from d = 0."""
    S, T = tl.exp(log_s), tl.exp(log_t)
    d = tl.minimum(tl.maximum(log_t - log_s, -_LIMIT), _LIMIT)
    if KIND == 'forward_kl':
        return S, _at_least_0(T * d - T + S), S - T
    if KIND == 'reverse_kl':
        return S, _at_least_0(T - S - S * d), -d
    if KIND == 'tvd':
        return S, tl.abs(T - S) * 0.5, tl.where(d > 0, -0.5, tl.where(d < 0, 0.5, 0.0)).to(d.dtype)
    if KIND == 'skew_reverse_kl' and W < _SLIGHT:
        column, falling = _slight(S, T, d, W)
        return S, column, -falling
    over_s, over_t, ratio = _mixture(d, W, REST)
    if KIND == 'jsd':
        return S, _at_least_0(-(W * T * over_t + REST * S * over_s)), -REST * over_s
    if KIND == 'skew_forward_kl':
        column = _at_least_0(REST * (S - T) - T * over_t)
        if REST < _SLIGHT:
            column, _ = _slight(T, S, -d, REST)
        return S, column, REST * REST * ratio
    return S, _at_least_0(W * (T - S) - S * over_s), -(over_s + REST * W * ratio)


@triton.jit
def _log_mass(x):
    """log(x) of a mass, _LOWEST of none."""
    return tl.where(x > 0, tl.log(tl.maximum(x, 1e-300)), _LOWEST)


@triton.jit
def _tail_of_teacher(listed, counts, given, others, POWER: tl.constexpr, GIVEN: tl.constexpr, SLACK: tl.constexpr, KNOWN: tl.constexpr):
    """Its least and its largest log-mass, as `TopKTeacher.of_tail` has them, beside `listed` log-probabilities to the POWER."""
    finite = tl.maximum(listed, _LOWEST)
    if GIVEN:
        least, largest = given, given
    else:
        mass = 1 - tl.sum(tl.exp(tl.where(counts, finite, _LOWEST) if POWER == 1 else finite), 0)
        slack = tl.where(mass > KNOWN * SLACK, 0.0, SLACK) if POWER == 1 else SLACK
        least = _log_mass(tl.minimum(tl.maximum(mass - slack, 0.0), 1.0))
        largest = _log_mass(tl.minimum(tl.maximum(mass, 0.0) + slack, 1.0))
    if POWER != 1:
        ceiling = tl.min(tl.where(listed > _LOWEST, listed, float('inf')), 0)
        log_others = tl.log(others)
        packed = least if POWER < 1 else largest
        evenly = POWER * (largest if POWER < 1 else least) + (1 - POWER) * log_others
        ceiling = tl.maximum(ceiling, packed - log_others)
        full = tl.exp(packed - ceiling)
        part = full - tl.floor(full)
        packed = POWER * ceiling + _log_mass(tl.floor(full) + tl.where(part > 0, tl.exp(POWER * _log_mass(part)), 0.0))
        least, largest = (packed, evenly) if POWER < 1 else (evenly, packed)
        least, largest = tl.maximum(least, _LOWEST), tl.maximum(tl.maximum(least, largest), _LOWEST)
    if GIVEN or POWER != 1:
        elsewhere = tl.where(counts, _LOWEST, finite * POWER)
        least, largest = _logsumexp(elsewhere, least), _logsumexp(elsewhere, largest)
    any_listed = tl.max(counts.to(tl.int32), 0) > 0
    return tl.where(any_listed, tl.maximum(least, _LOWEST), 0.0), tl.where(any_listed, tl.maximum(largest, _LOWEST), 0.0)


@triton.jit
def _marginal(x, KIND: tl.constexpr, W: tl.constexpr, REST: tl.constexpr):
    """As `tails._marginal`."""
    y = tl.exp(-tl.abs(x))
    mixture = tl.where(x > 0, W + REST * y, W * y + REST)
    h = REST * tl.where(x > 0, y, 1.0) / mixture
    if KIND == 'skew_reverse_kl':
        return -h, h * (1 - h)
    log = tl.minimum(x, 0.0) - tl.log(mixture)
    return (log + h, h * h) if KIND == 'skew_forward_kl' else (log, h)


@triton.jit
def _slopes(odds, log_s, log_s_tail, listed, share, KIND: tl.constexpr, W: tl.constexpr, REST: tl.constexpr):
    """As `tails._slopes`."""
    common = tl.log(1 + tl.exp(-tl.abs(odds)))
    in_tail, inside = tl.minimum(odds, 0.0) - common, tl.minimum(-odds, 0.0) - common
    of_tail, rise_of_tail = _marginal(in_tail - log_s_tail, KIND, W, REST)
    marginal, rise = _marginal(inside + listed - log_s, KIND, W, REST)
    rise = rise_of_tail * tl.exp(inside) + tl.sum(share * rise, 0) * tl.exp(in_tail)
    return of_tail - tl.sum(share * marginal, 0), rise


@triton.jit
def _least_divergent(
    log_s,
    log_s_tail,
    listed,
    least,
    largest,
    KIND: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    STEPS: tl.constexpr,
    STILL: tl.constexpr,
):
    """As `tails.least_divergent`."""
    nothing = least * 0 + _LOWEST
    total, inside = _logsumexp(listed, nothing), _logsumexp(log_s, nothing)
    at = log_s_tail - inside
    if KIND != 'reverse_kl' and KIND != 'tvd':
        listed -= total
        share, ratio = tl.exp(listed), listed - (log_s - inside)
        ratio = tl.minimum(tl.maximum(ratio, -_LIMIT), _LIMIT)
        further = at + tl.sum(share * ratio, 0)
        if KIND != 'forward_kl':
            high = largest - total
            low = tl.minimum(tl.maximum(at + tl.min(tl.where(share > 0, ratio, 0.0), 0), least - total), high)
            at_low, _ = _slopes(low, log_s, log_s_tail, listed, share, KIND, W, REST)
            at_high, _ = _slopes(high, log_s, log_s_tail, listed, share, KIND, W, REST)
            low, high = tl.where(at_high <= 0, high, low), tl.where(at_low >= 0, low, high)
            further = tl.minimum(tl.maximum(further, low), high)
            step, steps = high - low, 0
            moves = step > STILL
            while moves:
                slope, rise = _slopes(further, log_s, log_s_tail, listed, share, KIND, W, REST)
                low, high = tl.where(slope < 0, further, low), tl.where(slope > 0, further, high)
                newton = -slope / rise
                good = (further + newton >= low) & (further + newton <= high) & (tl.abs(newton) <= tl.abs(step) / 2)
                step = tl.where(good, newton, (low + high) / 2 - further)
                further += step
                steps += 1
                moves = (tl.abs(step) > STILL) & (steps < STEPS)
        at = further
    return tl.minimum(tl.maximum(at + total, least), largest)


@_jit
def buckets_kernel(
    logits,
    ids,
    logprobs,
    tail_logprobs,
    lse,
    weight,
    label_lse,
    label_weight,
    label,
    value,
    tail_weight,
    per_id,
    k,
    columns,
    label_scale,
    over_softcap,
    KIND: tl.constexpr,
    W: tl.constexpr,
    REST: tl.constexpr,
    POWER: tl.constexpr,
    TAIL: tl.constexpr,
    GIVEN: tl.constexpr,
    SLACK: tl.constexpr,
    KNOWN: tl.constexpr,
    STEPS: tl.constexpr,
    STILL: tl.constexpr,
    LABELS: tl.constexpr,
    TRAINED: tl.constexpr,
    PER_ROW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K: tl.constexpr,
):
    """`topk.Listed.compare`, a row a program. LABELS: label_lse is made that of all columns; TRAINED: and its gradient added."""
    row, entry = tl.program_id(0), tl.arange(0, K)
    inside, place = entry < k, row * k + entry
    id = tl.load(ids + place, mask=inside, other=-1)
    counts = id >= 0
    z = tl.where(counts, tl.load(logits + place, mask=inside, other=0.0).to(tl.float64), _LOWEST)
    listed = tl.load(logprobs + place, mask=inside, other=float('-inf')).to(tl.float64)
    tail = tl.load(lse + row)
    total = _logsumexp(z, tail)
    student_tail = tail - total
    log_s, log_t = tl.where(counts, z - total, _LOWEST), tl.where(counts, listed * POWER, _LOWEST)
    # Without a bucket there is none of it on either side.
    log_s_tail, log_t_tail = tail * 0 + _LOWEST, tail * 0 + _LOWEST
    equal = tail != tail
    if TAIL:
        given = tl.maximum(tl.load(tail_logprobs + row).to(tl.float64), _LOWEST) if GIVEN else tail
        others = tl.maximum(columns - tl.sum(counts.to(tl.int32), 0), 1).to(tl.float64)
        least, largest = _tail_of_teacher(listed, counts, given, others, POWER, GIVEN, SLACK, KNOWN)
        log_s_tail = student_tail
        log_t_tail = least
        if not GIVEN or POWER != 1:
            log_t_tail = _least_divergent(log_s, log_s_tail, log_t, least, largest, KIND, W, REST, STEPS, STILL)
        equal = (log_t_tail > least) & (log_t_tail < largest)
    norm_s, norm_t = _logsumexp(log_s, log_s_tail), _logsumexp(log_t, log_t_tail)
    S, column, slope = _bucket(log_s - norm_s, log_t - norm_t, KIND, W, REST)
    S_tail, column_tail, slope_tail = _bucket(log_s_tail - norm_s, log_t_tail - norm_t, KIND, W, REST)
    column, S = tl.where(counts, column, 0.0), tl.where(counts, S, 0.0)
    if KIND == 'tvd':  # as in `topk._compare`
        share = tl.where(counts, tl.exp(log_t - norm_t), 0.0)
        slope_tail = tl.where(equal, tl.sum(share * slope, 0) / tl.sum(share, 0), slope_tail)
    if KIND == 'forward_kl':
        centre = tl.sum(tl.where(counts, slope, 0.0), 0) + slope_tail
        gradient, gradient_tail = slope - S * centre, slope_tail - S_tail * centre
    else:
        centre = tl.sum(S * slope, 0) + S_tail * slope_tail
        gradient, gradient_tail = S * (slope - centre), S_tail * (slope_tail - centre)
    scale = tl.load(weight + row).to(tl.float64)
    gradient = tl.where(counts, gradient, 0.0) * scale
    tl.store(value + row, (tl.sum(column, 0) + column_tail).to(tl.float32))
    if TAIL:
        gradient_tail = tl.where(student_tail < _LOWEST / 2, 0.0, gradient_tail) * scale
        tl.store(tail_weight + row, gradient_tail.to(tl.float32))
    if LABELS:
        for_labels = z * _scale_of(label_scale, row, PER_ROW)
        label_total = _logsumexp(for_labels, tl.load(label_lse + row))
        tl.store(label_lse + row, label_total)
        if TRAINED:
            one_hot = tl.where(id == tl.load(label + row), 1.0, 0.0)
            gradient += (tl.exp(for_labels - label_total) - one_hot) * tl.load(label_weight + row).to(tl.float64)
    if SOFTCAP:
        tanh = z * over_softcap
        gradient = gradient * (1 - tanh * tanh)
    tl.store(per_id + place, gradient.to(tl.float32), mask=inside)
