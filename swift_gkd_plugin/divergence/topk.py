"""A teacher of which only k log-probabilities per token are known.

**Buckets.** The k ids are k buckets and everything else is one more, for both sides: the tail. Merging columns never
makes a divergence larger, so the value is a lower bound of the full one, and student mass outside the teacher's ids has
a gradient. With `tail='renormalize'` there is no tail bucket: both sides are renormalised over the k ids, and the value
and the gradient say nothing of the mass outside.

**Temperature.** The log-probabilities were taken at a temperature τ, and the divergence is wanted at another one, T.
The tail's mass at T cannot be known. So both sides are bucketed at τ, and the k+1 buckets are then tempered: p_i^(τ/T),
renormalised. Without a tail this is softmax(z/T) over the k ids.

**Gradient.** Let B_i be the student's bucket log-probabilities, g_i = ∂D/∂B_i (it sums to 0), and S its columns at τ.
Then, with ∂B_i/∂(z_v/τ) = δ_iv - S_v for an id and [v in tail]·S_v/S_tail - S_v for the tail,

    ∂D/∂(z_v/τ) = g_i where v is the id i,        g_tail · S_v/S_tail where v is in the tail.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import LOWEST_LOGIT
from .kinds import Divergence, Scratch, columns


@dataclass
class TopKTeacher:
    """logprobs, ids: [tokens, k]. An entry counts where its log-probability is finite and its id in [0, vocab_size)."""

    logprobs: Tensor
    ids: Tensor
    tail: str
    temperature: float

    def entries(self, rows: slice, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """([rows, k] log-probabilities in fp64, LOWEST_LOGIT where the entry does not count; ids; which count)."""
        logprobs, ids = self.logprobs[rows].double(), self.ids[rows]
        present = (ids >= 0) & (ids < vocab_size) & (logprobs > -torch.inf)
        return logprobs.masked_fill(~present, LOWEST_LOGIT), ids, present


def log_tail(logprobs: Tensor) -> Tensor:
    """log(1 - Σ exp(logprobs)) along the last dimension, with LOWEST_LOGIT where rounding left nothing."""
    inside = torch.logsumexp(logprobs, -1, keepdim=True)
    return torch.log(-torch.expm1(inside.clamp_max(0))).clamp_min(LOWEST_LOGIT)


class Buckets(NamedTuple):
    value: Tensor  # [rows], D
    gradient: Tensor  # [rows, buckets], with respect to the student's log-probabilities
    kls: tuple[Tensor, Tensor] | None  # forward and reverse [rows], where asked for
    teacher_entropy: Tensor  # [rows]


def bucket_divergence(divergence: Divergence, student: Tensor, teacher: Tensor, sharpening: float, kl_sums: bool) -> Buckets:
    """student, teacher: [rows, buckets] log-probabilities at τ; sharpening: τ/T."""
    log_s, log_t = (torch.log_softmax(side * sharpening, -1) for side in (student, teacher))
    s, t = log_s.exp(), log_t.exp()
    entropy = -torch.linalg.vecdot(t, log_t)
    scratch = Scratch(*(torch.empty_like(s) for _ in range(4)))
    found, kls = columns(divergence, s, t, log_t - log_s, scratch, kl_sums)
    return Buckets(found.value, found.gradient(s, found.centre) * (found.factor * sharpening), kls, entropy)
