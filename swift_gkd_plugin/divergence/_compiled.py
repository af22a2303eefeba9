"""The sweeps on a CPU with a C++ compiler, made by torch.compile.

What `kinds.py` does in some thirty passes over a block becomes one loop, so that a large vocabulary costs little beside
its matrix products. There is no second statement of the mathematics: the functions compiled here call `kinds.columns`.
Sums over columns are in fp64, which costs nothing inside a loop: a running fp32 sum of 150,000 columns is off by 5e-6.

Each combination of options has kernels of its own, compiled in some seconds at its first use and kept on disk by torch.
"""

import functools
import logging
import types

import torch
from torch import Tensor

from .kinds import Divergence, Scratch, columns
from .sweeps import Logits, Sweeps, Tokens, in_one_line

logger = logging.getLogger(__name__)


class Compiled(Sweeps):
    def normalise(self, logits: Logits, tokens: Tokens) -> None:
        detail = tokens.best is not None
        for side, z in enumerate((logits.student, logits.teacher)):
            if z is None:
                continue
            labels = not side and tokens.label_lse is not None
            scale = _own(tokens.label_scale) if labels and self.setting.label_scale != 1 else None
            base = logits.student if side and logits.difference else None
            top, log_total, log_of_labels, best, entropy = _normaliser(scale is not None, detail)(z, base, scale)
            tokens.lse[side] = top.double() + log_total
            if labels:
                tokens.label_lse.copy_(top.double() * tokens.label_scale.double() + log_of_labels)
            if detail:
                tokens.top[side], tokens.best[side] = top, best + self.setting.vocabulary.first_id
                tokens.entropy[side] = entropy

    def sums(self, divergence: Divergence, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        found = _summing(divergence, logits.difference)(logits.student, logits.teacher, *_norms(tokens))
        for into, sums in zip(out, found, strict=False):
            into.copy_(sums)

    def gradient(self, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        sweep = _differentiating(self.setting.divergence, logits.difference, self.setting.over_softcap)
        inputs = logits.student, logits.teacher, *_norms(tokens), _own(tokens.sums[1]), _own(tokens.weight), self._label(tokens)
        sweep(*inputs, None if out is logits.student else out)

    def tail_gradient(self, logits: Logits, tokens: Tokens, tail_weight: Tensor | None, out: Tensor) -> None:
        sweep = _tail(tail_weight is not None, self.setting.over_softcap)
        sweep(
            logits.student,
            _own(tokens.lse[0]),
            None if tail_weight is None else _own(tail_weight),
            self._label(tokens),
            None if out is logits.student else out,
        )

    def _label(self, tokens: Tokens) -> tuple[Tensor, ...] | None:
        if tokens.label_weight is None:
            return None
        numbers = (_own(x) for x in (tokens.label_lse, tokens.label_scale, tokens.label_weight))
        return *numbers, tokens.label - self.setting.vocabulary.first_id


def _norms(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides' log-sum-exp, and the teacher's minus the student's."""
    return *(_own(side) for side in tokens.lse), (tokens.lse[1] - tokens.lse[0]).float()


def _own(x: Tensor) -> Tensor:
    """In fp32 and memory of its own: a view's place in memory is something that torch.compile compiles again for."""
    return x.to(torch.float32, copy=True)


def _compile(function):
    # One kernel for any number of rows, and no other to be made at the same time. The options are in the closure, so that
    # a process may use any number of them; what is left to compile again for, a single row or inference mode, stays far
    # below the limit, beyond which torch would fail.
    common = dict(fullgraph=True, dynamic=True, options={'compile_threads': 1})
    if torch.__version__ >= (2, 13):
        return torch.compile(function, isolate_recompiles=True, recompile_limit=64, **common)
    # Older ones count by code, whatever its closure: hence a copy of the code.
    own = types.FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    own.__defaults__ = function.__defaults__
    compiled = torch.compile(own, **common)

    def limited(*args):
        with torch._dynamo.config.patch(recompile_limit=64):
            return compiled(*args)

    return limited


@functools.cache
def works() -> bool:
    """Whether there is a C++ compiler that torch.compile can use; a warning, once, where there is none."""
    reason = 'it is switched off'
    try:
        if _compile(lambda x: x + torch.compiler.is_compiling())(torch.zeros(2)).all():
            return True
    except Exception as error:  # whatever a compiler, its headers or its cache directory can lack
        reason = in_one_line(error)
    logger.warning('torch.compile does not work here (%s): the divergence is computed without it, right but slower', reason)
    return False


@functools.cache
def _normaliser(scaled: bool, detail: bool):
    def sweep(z, base, scale):
        z = z if base is None else base + z
        top = z.amax(-1)
        below = z - top[:, None]
        total = below.exp().sum(-1, dtype=torch.float64)
        of_labels = (below * scale[:, None]).exp().sum(-1, dtype=torch.float64) if scaled else total
        if not detail:
            return top, total.log(), of_labels.log(), None, None
        entropy = total.log() - (below.exp() * below).sum(-1, dtype=torch.float64) / total
        return top, total.log(), of_labels.log(), z.argmax(-1), entropy

    return _compile(sweep)


@functools.cache
def _summing(divergence: Divergence, difference: bool):
    def sweep(zs, zt, norm_s, norm_t, shift):
        found, _ = _columns(divergence, difference, zs, zt, norm_s, norm_t, shift)
        return found.value, found.centre

    return _compile(sweep)


@functools.cache
def _differentiating(divergence: Divergence, difference: bool, over_softcap: float | None):
    def sweep(zs, zt, norm_s, norm_t, shift, centre, weight, label, out):
        found, student = _columns(divergence, difference, zs, zt, norm_s, norm_t, shift)
        gradient = found.gradient(student, centre) * (found.factor * weight)[:, None]
        (zs if out is None else out).copy_(_finished(gradient, zs, label, over_softcap))

    return _compile(sweep)


@functools.cache
def _tail(any_tail: bool, over_softcap: float | None):
    def sweep(zs, norm, weight, label, out):
        gradient = (zs - norm[:, None]).exp() * weight[:, None] if any_tail else torch.zeros_like(zs)
        (zs if out is None else out).copy_(_finished(gradient, zs, label, over_softcap))

    return _compile(sweep)


def _finished(gradient, zs, label, over_softcap: float | None) -> Tensor:
    """The cross-entropy's gradient and the softcap's derivative."""
    if label is not None:
        norm, scale, weight, column = (x[:, None] for x in label)
        one_hot = (torch.arange(zs.shape[1]) == column).to(zs.dtype)
        gradient = gradient + ((zs * scale - norm).exp() - one_hot) * weight
    if over_softcap is not None:
        gradient = gradient * (1 - (zs * over_softcap).square())
    return gradient


def _columns(divergence, difference, zs, zt, norm_s, norm_t, shift):
    """`kinds.columns`, and the student's probabilities. The buffers are the compiler's, which keeps none."""
    zt, d = (zs + zt, zt) if difference else (zt, zt - zs)
    student, teacher = (zs - norm_s[:, None]).exp(), (zt - norm_t[:, None]).exp()
    scratch = Scratch(*(torch.empty_like(zs) for _ in range(4)), sums=torch.float64)
    return columns(divergence, student, teacher.clone(), d - shift[:, None], scratch), student
