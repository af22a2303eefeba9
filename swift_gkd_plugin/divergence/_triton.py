"""The sweeps on a GPU: Triton's kernels, started on the device of their tensors, which need not be the current one.

The environment variable SWIFT_GKD_ONE_LOAD=1 takes one kernel in the place of three sweeps where it can: 10 bytes per pair of
logits are moved instead of 26. It is off by default until it has run on a GPU.
"""

import functools
import logging
import math
import os

import torch
import triton
from torch import Tensor

from . import _trial, memory, tails
from . import _triton_kernels as kernels
from .kinds import MAX_LOG_RATIO, Divergence
from .sweeps import Logits, Setting, Sweeps, Tokens, in_one_line
from .topk import Listed

logger = logging.getLogger(__name__)

# Eight columns a thread: four of a row's float4 in flight on each side, and few registers, so that many rows are.
_BLOCK = 2048
# A program holds all that is listed of a token.
_MOST_LISTED = 1024
ONE_LOAD = 'SWIFT_GKD_ONE_LOAD'
# Of a row, for a program that keeps them: 16 pairs a thread, and three programs fit into a multiprocessor.
_SLICE = 4096
# Programs that run one after the other can't wait for each other.
_ONE_BY_ONE = triton.knobs.runtime.interpret
# Rows that it is tried with: more programs than a GPU has room for.
TRIED = 2 if _ONE_BY_ONE else 64
# Multiplications and additions are to be one instruction, which Triton's newer versions no longer take for granted.
_OPTIONS = dict(num_warps=8, enable_fp_fusion=True)


class Triton(Sweeps):
    kinds = frozenset({'jsd', 'forward_kl', 'reverse_kl', 'skew_forward_kl', 'skew_reverse_kl', 'tvd'})

    def normalise(self, logits: Logits, tokens: Tokens) -> None:
        nothing, detail, vocabulary = tokens.lse[0], tokens.best is not None, self.setting.vocabulary
        best = torch.empty(len(nothing), dtype=torch.int32, device=nothing.device) if detail else nothing
        for side, z in enumerate((logits.student, logits.teacher)):
            if z is None:
                continue
            labels = not side and tokens.label_lse is not None
            scale, per_row = self._label_scale(tokens if labels else None)
            with torch.cuda.device_of(z):
                kernels.normalise_kernel[(len(z),)](
                    z,
                    logits.student,
                    tokens.lse[side],
                    tokens.label_lse if labels else nothing,
                    tokens.top[side] if detail else nothing,
                    best,
                    tokens.entropy[side] if detail else nothing,
                    z.shape[1],
                    z.stride(0),
                    scale,
                    ADD=bool(side and logits.difference),
                    LABELS=labels,
                    SCALED=labels and self.setting.label_scale != 1,
                    PER_ROW=per_row,
                    DETAIL=detail,
                    BLOCK=_BLOCK,
                    **(_OPTIONS | dict(num_warps=16) if detail else _OPTIONS),  # its sums need more registers
                )
            if detail:
                tokens.best[side] = best + vocabulary.first_id

    def sums(self, divergence: Divergence, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        zs, zt = logits.student, logits.teacher
        with torch.cuda.device_of(zs):
            kernels.value_kernel[(len(zs),)](
                zs,
                zt,
                *tokens.lse,
                out,
                out.stride(0),
                zs.shape[1],
                zs.stride(0),
                **_form(divergence),
                DIFFERENCE=logits.difference,
                CENTRE=len(out) > 1,
                BLOCK=_BLOCK,
                **_OPTIONS,
            )

    def gradient(self, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        zs, zt = logits.student, logits.teacher
        scale, per_row = self._label_scale(tokens)
        with torch.cuda.device_of(zs):
            kernels.gradient_kernel[self._grid(zs)](
                zs,
                zt,
                *tokens.lse,
                tokens.sums[1],
                tokens.weight,
                *self._label(tokens),
                out,
                zs.stride(0),
                self.setting.vocabulary.first_id,
                scale,
                self.setting.over_softcap or 1.0,
                **_form(self.setting.divergence),
                DIFFERENCE=logits.difference,
                LABELS=tokens.label_weight is not None,
                PER_ROW=per_row,
                SOFTCAP=bool(self.setting.softcap),
                BLOCK=_BLOCK,
                **_OPTIONS,
            )

    def at_once(self, logits: Logits, tokens: Tokens, out: Tensor) -> bool:
        labels = tokens.label_lse is not None
        # The one kernel knows one temperature of all labels.
        if os.environ.get(ONE_LOAD) != '1' or tokens.best is not None or (labels and self.setting.label_scale is None):
            return False
        if not _one_load_works(self.setting, logits.difference, labels, tokens.label_weight is not None, out.dtype):
            return False
        self.one_load(logits, tokens, out)
        return True

    def one_load(self, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        """`normalise`, `sums` and `gradient` in one kernel."""
        zs, zt, setting = logits.student, logits.teacher, self.setting
        rows, slices = len(zs), triton.cdiv(zs.shape[1], _SLICE)
        notes, arrived = zs.new_empty(rows, 7, slices), zs.new_zeros(rows + 1, dtype=torch.int32)
        labels = tokens.label_lse is not None
        with torch.cuda.device_of(zs):
            for sweep in (1, 2, 3) if _ONE_BY_ONE else (0,):
                kernels.one_load_kernel[(rows * slices,)](
                    zs,
                    zt,
                    *tokens.lse,
                    tokens.sums,
                    tokens.sums.stride(0),
                    tokens.weight,
                    *self._labels_or_nothing(tokens),
                    out,
                    notes,
                    arrived,
                    rows,
                    zs.shape[1],
                    zs.stride(0),
                    setting.vocabulary.first_id,
                    1.0 if setting.label_scale is None else setting.label_scale,
                    setting.over_softcap or 1.0,
                    **_form(setting.divergence),
                    DIFFERENCE=logits.difference,
                    LABELS=labels,
                    TRAINED=tokens.label_weight is not None,
                    SCALED=labels and setting.label_scale != 1,
                    SOFTCAP=bool(setting.softcap),
                    SWEEP=sweep,
                    SLICES=slices,
                    PLACES=triton.next_power_of_2(max(slices, 2)),
                    BLOCK=_SLICE,
                    **_OPTIONS,
                )

    def tail_gradient(self, logits: Logits, tokens: Tokens, tail_weight: Tensor | None, out: Tensor) -> None:
        z, norm = logits.student, tokens.lse[0]
        scale, per_row = self._label_scale(tokens)
        with torch.cuda.device_of(z):
            kernels.tail_gradient_kernel[self._grid(z)](
                z,
                norm,
                norm if tail_weight is None else tail_weight,
                *self._label(tokens),
                out,
                z.stride(0),
                self.setting.vocabulary.first_id,
                scale,
                self.setting.over_softcap or 1.0,
                TAIL=tail_weight is not None,
                LABELS=tokens.label_weight is not None,
                PER_ROW=per_row,
                SOFTCAP=bool(self.setting.softcap),
                BLOCK=_BLOCK,
                **_OPTIONS,
            )

    def combine(self, gathered: Tensor, norms: Tensor) -> None:
        n, rows = norms.shape
        with torch.cuda.device_of(norms):
            kernels.combine_kernel[(n, triton.cdiv(rows, 128))](
                gathered, norms, rows, norms.stride(0), RANKS=len(gathered), PLACES=128, num_warps=4
            )

    def take(self, logits: Tensor, ids: Tensor, out: Tensor, erase: bool = False) -> Tensor:
        if ids.shape[1] > _MOST_LISTED:
            return super().take(logits, ids, out, erase)
        with torch.cuda.device_of(logits):
            kernels.take_kernel[(len(ids),)](logits, ids.contiguous(), out, *self._few(logits, ids), ERASE=erase, **_few_options(ids))
        return out

    def put(self, ids: Tensor, values: Tensor, out: Tensor) -> None:
        if ids.shape[1] > _MOST_LISTED:
            return super().put(ids, values, out)
        with torch.cuda.device_of(out):
            kernels.put_kernel[(len(ids),)](values.float().contiguous(), ids.contiguous(), out, *self._few(out, ids), **_few_options(ids))

    def compare(self, listed: Listed, tokens: Tokens) -> tuple[Tensor | None, Tensor]:
        if tokens.kls is not None or listed.ids.shape[1] > _MOST_LISTED:
            return super().compare(listed, tokens)
        teacher, ids, weight, setting = listed.teacher, listed.ids, tokens.weight, self.setting
        tail_weight, per_id = torch.empty_like(weight), torch.empty_like(listed.logits)
        form, (scale, per_row) = _form(setting.divergence), self._label_scale(tokens)
        with torch.cuda.device_of(ids):
            kernels.buckets_kernel[(len(ids),)](
                listed.logits,
                ids,
                teacher.logprobs[listed.rows],
                weight if teacher.tail_logprobs is None else teacher.tail_logprobs[listed.rows],
                tokens.lse[0],
                weight,
                *self._labels_or_nothing(tokens),
                tokens.sums[0],
                tail_weight,
                per_id,
                ids.shape[1],
                setting.vocabulary.size,
                scale,
                setting.over_softcap or 1.0,
                KIND=form['KIND'],
                W=form['W'],
                REST=form['REST'],
                POWER=teacher.power,
                TAIL=teacher.tail == 'bucket',
                GIVEN=teacher.tail_logprobs is not None,
                SLACK=teacher.slack,
                KNOWN=tails.KNOWN,
                STEPS=tails.STEPS,
                STILL=tails.STILL,
                LABELS=tokens.label_lse is not None,
                TRAINED=tokens.label_weight is not None,
                PER_ROW=per_row,
                SOFTCAP=bool(setting.softcap),
                **_few_options(ids),
            )
        return tail_weight if teacher.tail == 'bucket' else None, per_id

    def _few(self, rows: Tensor, ids: Tensor) -> tuple[int, ...]:
        return ids.shape[1], rows.shape[1], rows.stride(0), self.setting.vocabulary.first_id

    @staticmethod
    def _grid(z: Tensor) -> tuple[int, int]:
        return len(z), triton.cdiv(z.shape[1], _BLOCK)

    @staticmethod
    def _labels_or_nothing(tokens: Tokens) -> list[Tensor]:
        """What is known of the labels; where there is nothing the kernel looks at nothing."""
        return [tokens.lse[0] if x is None else x for x in (tokens.label_lse, tokens.label_weight, tokens.label)]

    @staticmethod
    def _label(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        if tokens.label_weight is None:
            return (tokens.lse[0],) * 3
        return tokens.label_lse, tokens.label_weight, tokens.label

    def _label_scale(self, tokens: Tokens | None) -> tuple[float | Tensor, bool]:
        """A number, or one for each row and True. None: tokens without labels."""
        scale = self.setting.label_scale
        if scale is not None:
            return scale, False
        return (1.0, False) if tokens is None or tokens.label_scale is None else (tokens.label_scale, True)


def _few_options(ids: Tensor) -> dict:
    k = triton.next_power_of_2(max(ids.shape[1], 2))
    return dict(K=k, num_warps=max(1, k // 128))


@functools.cache
def works(device: torch.device, divergence: Divergence, label_temperatures: bool) -> bool:
    """Whether the kernels of a divergence can be compiled and started on a device, and do there what torch operations do; a
    warning, once, where they don't. label_temperatures: Whether labels have a temperature each, for which there are other kernels."""
    try:
        wrong = _trial.wrong(Triton, divergence, device, label_temperatures)
        if wrong is None:
            return True
        reason = f'a kernel gives wrong numbers: {wrong}'
    except Exception as error:  # whatever a compiler, Python's headers or a driver can lack
        reason = in_one_line(error)
    logger.warning('Triton does not work here (%s): the divergence is computed without it, right but slower', reason)
    return False


@functools.cache
def _one_load_works(setting: Setting, difference: bool, labels: bool, trained: bool, dtype: torch.dtype) -> bool:
    """Whether the one kernel gives the numbers of the three sweeps on this device; a warning, once, where it does not."""
    columns, device = setting.vocabulary.columns, setting.device
    slices = triton.cdiv(columns, _SLICE)
    try:
        if not _ONE_BY_ONE and slices > (there := torch.cuda.get_device_properties(device).multi_processor_count):
            raise ValueError(f'a row takes {slices} programs at a time, and there are {there} multiprocessors')
        wrong = off_by(setting, TRIED, difference, labels, trained, dtype)
        if not wrong < (1e-4 if dtype == torch.float32 else 1e-2):
            raise ValueError(f'it is off by {wrong:.1e}')
    except Exception as error:
        reason = in_one_line(error)
        logger.warning('%s=1 is not taken here (%s): the divergence is computed in three sweeps', ONE_LOAD, reason)
        return False
    return True


def off_by(setting: Setting, rows: int, difference: bool, labels: bool, trained: bool, dtype: torch.dtype) -> float:
    """How far the one kernel is from the three sweeps, relative to the largest number of each result. Without random numbers: a
    run has the same ones with and without this.

    Args:
        labels: With what cross-entropies are made of.
        trained: And with their gradient.
        dtype: Of the gradient.
    """
    device, columns = setting.device, setting.vocabulary.columns
    zs, zt, out = (memory.Rows(rows, columns, one, device)[0:rows] for one in (torch.float32, torch.float32, dtype))
    at = torch.arange(rows * columns, dtype=torch.float32, device=device).view(rows, columns)
    zs.copy_(at.mul(0.7).sin_().mul_(6))
    zt.copy_(at.mul(0.3).sin_().mul_(3)).add_(0 if difference else zs)
    weight, ids = torch.linspace(0.5, 1, rows, device=device), torch.arange(rows, device=device) * (columns // rows)
    found = []
    for one_load in (False, True):
        norms = torch.zeros(2 + labels, rows, dtype=torch.float64, device=device)
        tokens = Tokens(ids, weight, weight if trained else None, norms, norms[:2], sums=torch.zeros(2, rows, device=device))
        if labels:
            tokens.label_lse = norms[2]
        sweeps, logits = Triton(setting), Logits(zs, zt, difference)
        if one_load:
            sweeps.one_load(logits, tokens, out)
        else:
            sweeps.normalise(logits, tokens)
            sweeps.sums(setting.divergence, logits, tokens, tokens.sums)
            sweeps.gradient(logits, tokens, out)
        found.append((norms, tokens.sums[0], out.float()))
    return max(float((one - three).abs().max() / three.abs().max()) for three, one in zip(*found, strict=True))


# ---- near d = 0 ----


@functools.cache
def _form(divergence: Divergence) -> dict:
    """What the kernels are compiled for: the kind, the weights of its mixture, and the polynomials V and A."""
    kind, w = divergence.form
    value, slope = _near_zero(kind, w)
    even = kind == 'jsd' and w == 0.5
    return dict(KIND=kind, W=w, REST=1 - w, V=_polynomial(value, even), A=_polynomial(slope, even))


def _near_zero(kind: str, w: float):
    """D's column over (d²·a probability), and the slope (of the forward KL S·slope) over d (over S·d, but for its sign), of d.
    `_triton_kernels._column` says which probability. Of a JSD at ½ the second is (log(M/S) - d/2) / d²."""
    rest = 1 - w

    def over_s(d):  # log(M/S)
        return math.log1p(w * math.expm1(d))

    def over_t(d):  # log(M/T)
        return math.log1p(rest * math.expm1(-d))

    def s_over_m(d):  # S/M - 1
        return -w * math.expm1(d) / (1 + w * math.expm1(d))

    return {
        'forward_kl': (lambda d: (d + math.expm1(-d)) / d**2, lambda d: math.expm1(d) / d),
        'reverse_kl': (lambda d: (math.expm1(d) - d) / d**2, lambda d: 1.0),
        'tvd': (lambda d: 1.0, lambda d: math.expm1(d) / d),
        'jsd': (
            lambda d: (d * (1 - rest * (1 + s_over_m(d))) - over_s(d)) / d**2,
            (lambda d: (over_s(d) - d / 2) / d**2) if w == 0.5 else lambda d: -rest * over_s(d) / d,
        ),
        'skew_forward_kl': (
            lambda d: (rest * math.expm1(-d) - over_t(d)) / d**2,
            lambda d: rest**2 / w * s_over_m(d) / d,
        ),
        'skew_reverse_kl': (
            lambda d: (w * math.expm1(d) - over_s(d)) / d**2,
            lambda d: -(over_s(d) + rest * s_over_m(d)) / d,
        ),
    }[kind]


def _polynomial(function, even: bool) -> tuple[float, ...]:
    """The coefficients in d, or in d² where it is even, of the polynomial through the function's values at Chebyshev's points of
    |d| < NEAR: off by 2e-7 of the value at most."""
    n, reach = (4, kernels.NEAR**2) if even else (8, kernels.NEAR)
    points = [math.cos((i + 0.5) * math.pi / n) for i in range(n)]
    at = [math.sqrt((x + 1) / 2 * reach) if even else x * reach for x in points]
    scaled = torch.tensor([[((x + 1) / 2 if even else x) ** i for i in range(n)] for x in points], dtype=torch.float64, device='cpu')
    values = torch.tensor([function(d) for d in at], dtype=torch.float64, device='cpu')
    return tuple(c / reach**i for i, c in enumerate(torch.linalg.solve(scaled, values).tolist()))


assert MAX_LOG_RATIO == 10000.0, 'the kernels spell this number out'
