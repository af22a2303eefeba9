"""Which implementation of the sweeps a call gets."""

import functools
import importlib.util
import logging

import torch

from ._eager import Eager
from .chunks import Call
from .kinds import Divergence
from .sharding import on_all_ranks
from .sweeps import Sweeps

logger = logging.getLogger(__name__)

_HAS_TRITON = importlib.util.find_spec('triton') is not None
# On a CPU torch.compile may make the sweeps from this vocabulary on: a model's, not a test's.
_COMPILED_VOCABULARY = 1 << 15
# And once a process has worked on so many logits without: it takes 14 to 40 s to compile, which is what that has cost more.
COMPILED_AFTER = 8 << 30


def choose(call: Call) -> type[Sweeps]:
    """Triton's kernels on a GPU, on a CPU loops that torch.compile makes once a run is long enough; else, and
    for a divergence that has no kernel yet, torch operations."""
    group = call.vocabulary.reduce.group
    if call.student.dtype != torch.float32:
        return Eager
    if call.student.hidden.is_cuda:
        return _on_gpu(call.device, group, call.divergence, call.setting.label_temperature is None)
    # Not over a group: its ranks must agree, and only some of them might have a compiler.
    if call.device.type == 'cpu' and call.vocabulary.size >= _COMPILED_VOCABULARY and group is None:
        return _on_cpu(call.tokens * call.vocabulary.size)
    return Eager


def foreseen(on_gpu: bool, vocabulary: int, shards: int) -> str:
    """What :func:`choose` is going to take, in words, if everything works.

    Args:
        vocabulary: Columns that are compared.
        shards: Ranks that they are spread over.
    """
    if on_gpu:
        return "Triton's kernels" if _HAS_TRITON else 'torch operations, for Triton is not installed'
    if vocabulary >= _COMPILED_VOCABULARY and shards == 1:
        return f'torch operations on the CPU, and compiled loops after {COMPILED_AFTER >> 30} Gi logits'
    return 'torch operations on the CPU'


@functools.cache
def _on_gpu(device: torch.device, group, divergence: Divergence, label_temperatures: bool) -> type[Sweeps]:
    """Triton's, where its kernels do as they should: on every rank of the group, for the ranks must make the same reductions."""
    works = False
    if _HAS_TRITON:
        try:
            from . import _triton
        except Exception as error:  # of another version than those that are known
            logger.warning('Triton cannot be used (%s): the divergence is computed without it, right but slower', error)
        else:
            works = divergence.form[0] in _triton.Triton.kinds and _triton.works(device, divergence, label_temperatures)
    return _triton.Triton if on_all_ranks(group, works, device) else Eager


_worked_on = 0  # logits, by torch operations on the CPU


def _on_cpu(logits: int) -> type[Sweeps]:
    global _worked_on
    if _worked_on >= COMPILED_AFTER:
        return _compiled_sweeps() or Eager
    _worked_on += logits
    return Eager


@functools.cache
def _compiled_sweeps() -> type[Sweeps] | None:
    from . import _compiled

    if not _compiled.works():
        return None
    # A warning, for the run waits, and lower levels of this logger are not shown.
    logger.warning('torch.compile now makes the loops of the divergence for this CPU: 14 to 40 s for each kind, once, then from its cache')
    return _compiled.Compiled
