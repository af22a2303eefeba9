"""What a training run minimises, for both back ends."""

from __future__ import annotations

from dataclasses import dataclass

from ..divergence import Divergence


@dataclass(frozen=True)
class LossOptions:
    """What is minimised: the sum over trained tokens of ``weight · D(teacher, student) + alpha · imitated · cross-entropy``.

    Attributes:
        divergence: D, with its temperature.
        weight: Of the divergence (``--gkd_loss_weight``, times the squared temperature with ``--gkd_temperature_squared``);
            at 0 there is no teacher.
        alpha: Of the cross-entropy, on tokens that the student did not generate (``--sft_alpha``).
        tail: How a top-k teacher's remaining mass is treated (``--gkd_tail``).
        vocab_size: Number of token ids that both models have.
    """

    divergence: Divergence
    weight: float
    alpha: float
    tail: str
    vocab_size: int | None
