"""The elementwise work on a block of logits: what an implementation of it must do, and what it reads and fills.

    normalise       one sweep over either side: its log-sum-exp, and that of the student at its labels' temperature
    sums            one sweep over both: D, and the slope's centre Σ S·a
    gradient        one sweep over both: S·(a - Σ S·a)
    tail_gradient   one sweep over the student's: the gradient against a top-k teacher's tail, and of the cross-entropy

The centre needs a whole row before the first column of its gradient can be written, hence a sweep of its own, and where the
vocabulary is sharded the group's reductions sit between the sweeps. `chunks.py` calls them; `_eager.py` implements them by
torch operations, `_compiled.py` by loops that torch.compile makes, `_triton.py` by Triton's kernels.
"""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .kinds import KINDS, Divergence
from .sharding import Vocabulary

# Stands for a logit of -inf: exp() of it is 0 beside any real logit, and differences of two of them are finite.
LOWEST_LOGIT = -1e30


@dataclass(frozen=True)
class Logits:
    """A block's, [rows, columns] each, divided by the temperature. The columns are those of this rank."""

    student: Tensor
    teacher: Tensor | None  # None: there is no teacher, or one of which k log-probabilities are known
    difference: bool = False  # `teacher` holds the teacher's logits minus the student's

    def rows(self, rows: slice) -> 'Logits':
        return Logits(self.student[rows], None if self.teacher is None else self.teacher[rows], self.difference)


@dataclass
class Tokens:
    """What is known of each token: [tokens], or [n, tokens] where it says so. None where nobody asks for it."""

    label: Tensor | None  # ids
    weight: Tensor | None  # of D's gradient with respect to the logits
    label_weight: Tensor | None  # of the cross-entropy's gradient; None where it is not part of the loss
    norms: Tensor  # [1 to 3, tokens] fp64, what follows, one after the other
    lse: Tensor  # [1 or 2, tokens], log Σ exp of the student's logits and the teacher's; of the student's tail for top-k
    label_lse: Tensor | None = None  # the student's at the label's temperature
    label_logit: Tensor | None = None
    label_scale: Tensor | None = None  # what brings logits to the label's temperature
    log_ratio: Tensor | None = None  # fp64, of the label's probability to an older policy's
    sums: Tensor | None = None  # [2, tokens], D and Σ S·a
    kls: Tensor | None = None  # [2, tokens], forward and reverse
    top: Tensor | None = None  # [1 or 2, tokens], the largest logit
    best: Tensor | None = None  # [1 or 2, tokens] its id, the first of equal ones
    entropy: Tensor | None = None  # [1 or 2, tokens], of the distribution of which `lse` is the normaliser
    label_prob: Tensor | None = None  # the teacher's
    mass: Tensor | None = None  # the student's, on a top-k teacher's ids

    def part(self, rows: slice) -> 'Tokens':
        """Views of the tokens in `rows`."""
        return Tokens(*(None if (x := getattr(self, field.name)) is None else x[..., rows] for field in fields(self)))


@dataclass(frozen=True)
class Setting:
    """What all blocks of a call have in common."""

    divergence: Divergence
    vocabulary: Vocabulary
    temperature: float  # that the logits were divided by
    softcap: float | None
    dtype: torch.dtype  # of the logits
    device: torch.device
    label_temperature: float | None = 1.0  # of the cross-entropy; None: each token has its own

    @property
    def over_softcap(self) -> float | None:
        """What makes logits the softcap's tanh."""
        return self.temperature / self.softcap if self.softcap else None

    @property
    def label_scale(self) -> float | None:
        """What brings logits to the labels' temperature, rounded to their dtype as a kernel's argument is; None: what
        `Tokens.label_scale` says of each token. A label's logit and the sum over all of them must be multiplied by the same number,
        or their difference is off by what it rounds of them."""
        if self.label_temperature is None:
            return None
        scale = self.temperature / self.label_temperature
        return scale if self.dtype == torch.float64 else ctypes.c_float(scale).value


class Sweeps(ABC):
    """One implementation. It may keep of one sweep what it needs for the next one over the same block."""

    kinds: Container[str] = KINDS  # of divergences that it knows
    in_place = False  # whether gradients can be written in the place of the student's logits only

    def __init__(self, setting: Setting):
        self.setting = setting

    def rows(self, chunk: int) -> int:
        """How many rows of a chunk to work on at a time."""
        return chunk

    @abstractmethod
    def normalise(self, logits: Logits, tokens: Tokens) -> None:
        """Fill `lse`, and where they are not None `label_lse`, `top`, `best` and `entropy`, each over the columns that are here."""

    @abstractmethod
    def sums(self, divergence: Divergence, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        """Fill out [2, rows] with D and its slope's centre, or out [1, rows] with D, over the columns that are here. `tokens.lse`
        is that of all columns."""

    @abstractmethod
    def gradient(self, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        """Fill out [rows, columns], which may be the student's logits or in half precision, with the gradient of weight·D, and of
        the weighted cross-entropy where there is a label_weight. `tokens.sums` are those of all columns."""

    @abstractmethod
    def tail_gradient(self, logits: Logits, tokens: Tokens, tail_weight: Tensor | None, out: Tensor) -> None:
        """The same with tail_weight·softmax [rows] in place of D's gradient; None: that of the cross-entropy alone."""

    def at_once(self, logits: Logits, tokens: Tokens, out: Tensor) -> bool:
        """Do `normalise`, `sums` and `gradient` of all columns, a row's being here, and say True, or nothing and False."""
        return False

    def combine(self, gathered: Tensor, norms: Tensor) -> None:
        """Fill norms [n, rows] with log Σ exp of what the ranks of a group have, [ranks, n, rows]."""
        norms.copy_(gathered.logsumexp(0))

    def compare(self, listed, tokens: Tokens) -> tuple[Tensor | None, Tensor]:
        """`topk.Listed.compare`."""
        return listed.compare(self.setting, tokens)

    def take(self, logits: Tensor, ids: Tensor, out: Tensor, erase: bool = False) -> Tensor:
        """Fill out [rows, k] with the logits of ids, 0 of those that are not here; of [rows, columns], where `erase` leaves
        LOWEST_LOGIT."""
        column, here = self.setting.vocabulary.find(ids)
        out.copy_(logits.gather(1, column).masked_fill_(~here, 0))
        if erase:
            lowest = logits.new_full(here.shape, torch.inf).masked_fill_(here, LOWEST_LOGIT)
            logits.scatter_reduce_(1, column, lowest, 'amin')
        return out

    def put(self, ids: Tensor, values: Tensor, out: Tensor) -> None:
        """Write values [rows, k] at ids into out [rows, columns], but for those that are not here."""
        column, here = self.setting.vocabulary.find(ids)
        values = torch.where(here, values.to(out.dtype), out.gather(1, column))
        # What is not here repeats what one does that is; where nothing is, what is there.
        one = here.int().argmax(-1, keepdim=True)
        column = torch.where(here, column, column.gather(1, one))
        out.scatter_(1, column, torch.where(here, values, values.gather(1, one)))


def in_one_line(error: Exception) -> str:
    """Why an implementation cannot be used."""
    return (str(error).strip() or repr(error)).splitlines()[0]
