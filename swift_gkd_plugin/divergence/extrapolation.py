"""A teacher beyond itself, as seen from a reference: G-OPD (Yang et al., 2026, arXiv 2602.12125).

The reverse KL to a teacher T maximises the reward log(T/R) under a KL(S‖R) of the same weight, whatever the reference R is. With the
weight λ on the reward it is the reverse KL to another teacher, at the divergence's temperature like T and R:

    λ·E[log(T/R)] - KL(S‖R) = -KL(S‖T') + constant        T' ∝ T^λ · R^(1-λ), of logits λ·z_T + (1-λ)·z_R

λ > 1 goes on in the direction from R to T, λ < 1 stops on the way. Any other divergence can be had to T' as well: only the teacher's
logits change.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .heads import LogitTransform
from .sweeps import LOWEST_LOGIT


@dataclass(frozen=True)
class Reference:
    """What the teacher is extrapolated from. No gradient goes there.

    hidden [tokens, dim] and weight [vocab, dim] with bias, transform and lora as of the other heads; or hidden [tokens, vocab] are
    ready logits, and weight is None. extrapolation: λ, positive and finite; at 1 the teacher is as without a reference.
    """

    hidden: Tensor
    weight: Tensor | None
    extrapolation: float
    bias: Tensor | None = None
    transform: LogitTransform | None = None
    lora: tuple[Tensor, Tensor, float] | None = None

    def __post_init__(self):
        if not 0 < self.extrapolation < math.inf:
            raise ValueError(f'extrapolation must be positive and finite, got {self.extrapolation}')


def extrapolate(teacher: Tensor, reference: Tensor, by: float, masked: bool) -> None:
    """teacher <- by·teacher + (1 - by)·reference in place; exactly the teacher where the two are equal. What is in `reference` is lost.

    masked: whether logits may stand for -inf. What either of the two rules out has probability 0, also where T^λ / R^(λ-1) would be
    infinite: the student cannot be asked for more of what its own base never says.
    """
    torch.lerp(reference, teacher, by, out=teacher)
    if masked:
        # The sum is above any logit but where the reference has none.
        torch.minimum(teacher, reference.add_(-1e-10 * LOWEST_LOGIT), out=teacher).clamp_min_(LOWEST_LOGIT)
