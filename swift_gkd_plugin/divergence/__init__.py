"""How far apart a student's and a teacher's next-token distributions are, from hidden states and output heads.

In the order to read them:

    kinds.py       the divergences: a closed form each, of value and gradient, and why it is that one
    operator.py    what callers use, and autograd
    chunks.py      the engine: chunks of tokens, from logits to losses and gradients
    implementations.py   which of the three below does it
    sweeps.py      what the engine asks of the elementwise work: normalise, sums, gradient
    _eager.py      that by torch operations on `kinds.py`
    _compiled.py   by loops that torch.compile makes of `kinds.py`
    _triton.py     by Triton's kernels, which are in _triton_kernels.py; _trial.py tries them out on a device
    topk.py        a teacher of which k log-probabilities are known
    clipping.py    labels of an older policy: importance ratios
    extrapolation.py     a teacher beyond itself, as seen from a reference
    heads.py, gradients.py, sharding.py, memory.py, stats.py

A divergence is added by its form in `kinds.py` (`Divergence.form`, `KINDS`, `_FORMS`) and its definition in
tests/divergence/divergence_reference.py. A GPU takes torch operations for it until Triton's `kinds` and kernels know it.
"""

from .clipping import Clipping
from .extrapolation import Reference
from .heads import LogitTransform, linear_logits
from .kinds import Divergence
from .operator import linear_divergence, logits_divergence, topk_divergence
from .stats import TokenStats

__all__ = [
    'Clipping',
    'Divergence',
    'LogitTransform',
    'Reference',
    'TokenStats',
    'linear_divergence',
    'linear_logits',
    'logits_divergence',
    'topk_divergence',
]
