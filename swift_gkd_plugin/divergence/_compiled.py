"""The elementwise part of a chunk on a CPU with a C++ compiler: the sweeps of `_triton.py`, made by torch.compile.

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

from .kinds import Columns, Divergence, Scratch, columns

logger = logging.getLogger(__name__)


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
        reason = str(error).strip().splitlines()[0]
    logger.warning('torch.compile does not work here (%s): the divergence is computed without it, right but slower', reason)
    return False


def normalise(zs: Tensor, zt: Tensor, difference: bool, temperature: float, labels: bool, best: bool) -> list[tuple[Tensor, ...]]:
    """As `_triton.normalise`, the sums in fp64."""
    teacher = (zt, zs) if difference else (zt,)
    return [_normaliser(temperature if labels and temperature != 1 else None, best)(zs), _normaliser(None, best)(*teacher)]


def sums(
    divergence: Divergence, zs: Tensor, zt: Tensor, difference: bool, norm_s: Tensor, norm_t: Tensor, shift: Tensor, detail: bool
) -> Tensor:
    """As `_triton.sums`, in fp64."""
    return torch.stack(_summing(divergence, difference, detail)(zs, zt, norm_s, norm_t, shift))


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
    """As `_triton.gradient`."""
    sweep = _differentiating(divergence, difference, temperature, softcap)
    sweep(zs, zt, norm_s, norm_t, shift, centre, weight, labels, None if out is zs else out)


@functools.cache
def _normaliser(label_temperature: float | None, best: bool):
    def sweep(z, base=None):
        z = z if base is None else base + z
        top = z.amax(-1)
        below = z - top[:, None]
        total = below.exp().sum(-1, dtype=torch.float64)
        at_one = total if label_temperature is None else (below * label_temperature).exp().sum(-1, dtype=torch.float64)
        return top, total, at_one, z.argmax(-1) if best else None

    return _compile(sweep)


@functools.cache
def _summing(divergence: Divergence, difference: bool, detail: bool):
    def sweep(zs, zt, norm_s, norm_t, shift):
        zt, d = _both(zs, zt, difference)
        student, teacher, found, kls = _columns(divergence, zs, zt, d, norm_s, norm_t, shift, detail)
        if not detail:
            return found.value, found.centre
        sides = ((student, zs, norm_s), (teacher, zt, norm_t))
        entropies = [-(p * (z - norm[:, None])).sum(-1, dtype=torch.float64) for p, z, norm in sides]
        return found.value, found.centre, *kls, *entropies

    return _compile(sweep)


@functools.cache
def _differentiating(divergence: Divergence, difference: bool, temperature: float, softcap: float | None):
    def sweep(zs, zt, norm_s, norm_t, shift, centre, weight, labels, out):
        zt, d = _both(zs, zt, difference)
        student, _, found, _ = _columns(divergence, zs, zt, d, norm_s, norm_t, shift)
        gradient = found.gradient(student, centre) * (found.factor * weight)[:, None]
        if labels is not None:
            norm, label_weight, column = (x[:, None] for x in labels)
            one_hot = (torch.arange(zs.shape[1]) == column).to(zs.dtype)
            gradient = gradient + ((zs * temperature - norm).exp() - one_hot) * label_weight
        if softcap:
            gradient = gradient * (1 - (zs * (temperature / softcap)).square())
        (zs if out is None else out).copy_(gradient)

    return _compile(sweep)


def _both(zs, zt, difference: bool) -> tuple[Tensor, Tensor]:
    """The teacher's logits, and those minus the student's; zt holds the first or the second."""
    return (zs + zt, zt) if difference else (zt, zt - zs)


def _columns(divergence, zs, zt, d, norm_s, norm_t, shift, kl_sums=False) -> tuple[Tensor, Tensor, Columns, tuple[Tensor, Tensor] | None]:
    """(student's probabilities, the teacher's, `kinds.columns` of them). The buffers are the compiler's, which keeps
    none."""
    student, teacher = (zs - norm_s[:, None]).exp(), (zt - norm_t[:, None]).exp()
    scratch = Scratch(*(torch.empty_like(zs) for _ in range(4)), sums=torch.float64)
    found, kls = columns(divergence, student, teacher.clone(), d - shift[:, None], scratch, kl_sums)
    return student, teacher, found, kls
