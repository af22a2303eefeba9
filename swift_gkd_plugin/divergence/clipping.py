"""The label term of a policy that has changed since its tokens were sampled: importance ratios, and their clipping."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Of a ratio's logarithm, so that it stays a number in fp32 however far apart the two policies are.
_MAX_LOG_RATIO = 80.0


@dataclass(frozen=True)
class Clipping:
    """Where a label's weight w is the advantage of a token that an older policy sampled: with r = S(label) / exp(old_logprobs),
    at the label's temperature, its term is

        -min(min(r, delta)·w, clip(r, 1 - low, 1 + high)·w)

    in place of w·CE. PPO (Schulman et al. 2017, arXiv 1707.06347); a high above low: DAPO (arXiv 2503.14476); delta: INTELLECT-2
    (arXiv 2505.07291). ms-swift calls the three `epsilon`, `epsilon_high` and `delta`. The gradient with respect to the logits is
    w·r·(S - onehot) / label_temperature where r is within the bounds that count for the sign of w, and 0 beyond them:

        w > 0       r <= min(1 + high, delta)
        w < 0       1 - low <= r <= max(1 + high, delta); without a delta only 1 - low <= r

    Args:
        old_logprobs: [tokens], the older policy's log-probabilities of the labels, at their temperatures. NaN: the token keeps w·CE.
        log_ratios: [tokens] log r, where r is of more than the label: of its whole response, the mean over its tokens (GSPO,
            arXiv 2507.18071). NaN as above. None: r is that of the label.
        low, high: how far below and above 1 a ratio counts, >= 0.
        delta: the most that a ratio counts for where w < 0, > 0; None: there is no most, but for exp(80).

    Raises ValueError for a number outside its range.
    """

    old_logprobs: Tensor
    low: float
    high: float
    delta: float | None = None
    log_ratios: Tensor | None = None

    def __post_init__(self):
        for name, bound in (('low', self.low), ('high', self.high)):
            if not bound >= 0:
                raise ValueError(f'{name} of a clipping must be >= 0, got {bound}')
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f'delta of a clipping must be > 0 or None, got {self.delta}')

    def log_ratio(self, rows: slice, logprobs: Tensor) -> Tensor:
        """log r of labels with these `logprobs` [rows]; NaN where a label's term has no ratio."""
        found = logprobs - self.old_logprobs[rows] if self.log_ratios is None else self.log_ratios[rows]
        return found.clamp(max=_MAX_LOG_RATIO)

    def slope(self, log_ratio: Tensor, weight: Tensor) -> Tensor:
        """What the gradient of w·CE is multiplied by [rows]: r, 0 beyond the bounds, 1 where there is no ratio."""
        ratio = log_ratio.exp()
        return ratio.masked_fill(self._beyond(ratio, weight), 0).nan_to_num(nan=1.0)

    def bounded(self, log_ratio: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(r within its bounds, whether it was beyond them), [rows] each, of weights w [rows]; NaN and False where there is none."""
        ratio, (gaining, losing) = log_ratio.exp(), self._highest
        bounded = torch.where(weight > 0, ratio.clamp(max=gaining), ratio.clamp(1 - self.low, losing))
        return bounded, self._beyond(ratio, weight) & (weight != 0)

    def _beyond(self, ratio: Tensor, weight: Tensor) -> Tensor:
        """Of a weight of 0 anything."""
        gaining, losing = self._highest
        beyond = ratio < 1 - self.low
        if self.delta is not None:
            beyond |= ratio > losing
        return torch.where(weight > 0, ratio > gaining, beyond)

    @property
    def _highest(self) -> tuple[float, float]:
        """Bounds of r where w > 0 and where w < 0."""
        delta = torch.inf if self.delta is None else self.delta
        return min(1 + self.high, delta), max(1 + self.high, delta)
