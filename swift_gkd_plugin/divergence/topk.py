"""A teacher of which only k log-probabilities per token are known.

**Buckets.** The k ids are k buckets and everything else is one more, for both sides: the tail. Merging columns never
makes a divergence larger, so the value is a lower bound of the full one, and student mass outside the teacher's ids has
a gradient. With `tail='renormalize'` there is no tail bucket: both sides are renormalised over the k ids, and the value
and the gradient say nothing of the mass outside.

**The teacher's tail.** Its mass is known up to rounding where the log-probabilities were taken at the temperature T of the
divergence, and within an interval where they were taken at another one, τ: theirs are then p^(τ/T), the student's columns are
softmax(z/T). Of the masses in question the one counts at which the divergence is least, and the value stays a lower bound
of the full one: `tails.py`. Without a tail both sides are softmax(z/T) over the k ids.

**Gradient.** Let B_i be the student's bucket log-probabilities, g_i = ∂D/∂B_i (it sums to 0), and S its columns.
Then, with ∂B_i/∂(z_v/T) = δ_iv - S_v for an id and [v in tail]·S_v/S_tail - S_v for the tail,

    ∂D/∂(z_v/T) = g_i where v is the id i,        g_tail · S_v/S_tail where v is in the tail.

S_v/S_tail is a softmax over the tail's logits, finite however small S_tail is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tails
from .kinds import Divergence, Scratch, columns
from .sweeps import LOWEST_LOGIT, Setting, Tokens


@dataclass(frozen=True)
class TopKTeacher:
    """logprobs, ids: [tokens, k], ids -1 where an entry does not count; tail_logprobs: [tokens] log of the mass of what is not
    listed, or None. All at a temperature that is `power` times the divergence's."""

    logprobs: Tensor
    ids: Tensor
    tail: str
    tail_logprobs: Tensor | None
    power: float = 1.0

    @classmethod
    def of(
        cls, logprobs: Tensor, ids: Tensor, tail: str, tail_logprobs: Tensor | None, vocab_size: int, power: float = 1.0
    ) -> 'TopKTeacher':
        """An entry counts where its log-probability is finite and its id in [0, vocab_size)."""
        if not ids.shape[1]:  # one that does not count is less trouble than none
            logprobs, ids = logprobs.new_full((len(ids), 1), -torch.inf), ids.new_full((len(ids), 1), -1)
        counts = (ids >= 0) & (ids < vocab_size) & (logprobs > -torch.inf)
        # In memory as kernels read them, one after the other.
        given = None if tail_logprobs is None else tail_logprobs.contiguous()
        return cls(logprobs.contiguous(), ids.masked_fill(~counts, -1).contiguous(), tail, given, power)

    @property
    def slack(self) -> float:
        return tails.slack(self.logprobs.dtype)

    @property
    def known(self) -> float:
        """The mass above which a tail has no slack. Brought to another temperature every one has: of a power below 1 little goes a
        long way."""
        return tails.KNOWN * self.slack if self.power == 1 else torch.inf

    def of_listed(self, rows: slice) -> Tensor:
        """Their log-probabilities [rows, k] in fp64 at the divergence's temperature, for a power other than 1 not normalised;
        LOWEST_LOGIT of entries that do not count."""
        return (self.logprobs[rows].double() * self.power).masked_fill(self.ids[rows] < 0, LOWEST_LOGIT)

    def of_tail(self, rows: slice, vocab_size: int) -> tuple[Tensor, Tensor]:
        """The least and the largest log-mass [rows, 1] that the tail can have beside them, LOWEST_LOGIT for none. An id that the
        student lacks is tail, too."""
        logprobs, present = self.logprobs[rows].double(), self.ids[rows] >= 0
        elsewhere = (logprobs * self.power).masked_fill(present, -torch.inf).logsumexp(-1, keepdim=True)
        if self.tail_logprobs is not None:
            least = largest = self.tail_logprobs[rows, None].double()
        elif self.power == 1:
            least, largest = tails.masses(self.of_listed(rows), self.slack, self.known)
            elsewhere = torch.full_like(elsewhere, -torch.inf)  # is part of 1 - Σ
        else:
            least, largest = tails.masses(logprobs.clamp_min(LOWEST_LOGIT), self.slack, self.known)
        if self.power != 1:
            ceiling = logprobs.masked_fill(logprobs == -torch.inf, torch.inf).amin(-1, keepdim=True)
            others = (vocab_size - present.sum(-1, keepdim=True)).clamp_min(1).double()
            least, largest = tails.powers(least, largest, ceiling, others, self.power)
        none = ~present.any(-1, keepdim=True)
        return tuple(torch.logaddexp(x, elsewhere).clamp_min(LOWEST_LOGIT).masked_fill(none, 0) for x in (least, largest))


@dataclass
class Buckets:
    """Both sides of a block in fp64. student: [rows, buckets] log-probabilities. listed: [rows, k] the teacher's, normalised or not.
    least, largest: [rows, 1] likewise, what its tail may be; None where there is no tail, and buckets = k."""

    student: Tensor
    listed: Tensor
    least: Tensor | None = None
    largest: Tensor | None = None

    def compare(self, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """D [rows], and its gradient with respect to the student's logits [rows, buckets]."""
        if self.least is None:
            return _compare(divergence, self.student, torch.log_softmax(self.listed, -1))
        tail = tails.least_divergent(divergence, self.student, self.listed, self.least, self.largest)
        equal = (tail > self.least) & (tail < self.largest) if divergence.kind == 'tvd' else None
        return _compare(divergence, self.student, self._teacher(tail), equal)

    def entropy(self) -> Tensor:
        """The teacher's [rows], a lower bound: over its tail's share it is concave, and so least at an end."""
        ends = [self.listed] if self.least is None else [torch.cat([self.listed, end], -1) for end in (self.least, self.largest)]
        found = [-torch.linalg.vecdot(log_t.exp(), log_t) for log_t in (torch.log_softmax(end, -1) for end in ends)]
        return torch.minimum(found[0], found[-1])

    def _teacher(self, tail: Tensor) -> Tensor:
        return torch.log_softmax(torch.cat([self.listed, tail], -1), -1)


@dataclass
class Listed:
    """A block's entries, and the student's logits [rows, k] of their ids."""

    teacher: TopKTeacher
    rows: slice
    logits: Tensor

    @property
    def ids(self) -> Tensor:
        return self.teacher.ids[self.rows]

    @property
    def _student(self) -> Tensor:
        return self.logits.double().masked_fill(self.ids < 0, LOWEST_LOGIT)

    def label_lse(self, tokens: Tokens) -> Tensor:
        """`tokens.label_lse`, which is the tail's, of the whole."""
        return torch.logaddexp(tokens.label_lse, (self._student * tokens.label_scale[:, None].double()).logsumexp(-1))

    def compare(self, setting: Setting, tokens: Tokens) -> tuple[Tensor | None, Tensor]:
        """D into `tokens.sums`, and the statistics. `tokens` know of the student's tail so far, and are told of the whole.

        Returns the gradient of the block's loss with respect to the head's products: the tail's [rows] as a factor of the
        softmax over it, None for none; and that of each entry [rows, k]. The buckets are few, so their arithmetic is in fp64.
        """
        ids = self.ids
        present = ids >= 0
        z = self._student
        tail = tokens.lse[0][:, None]
        total = torch.cat([z, tail], -1).logsumexp(-1, keepdim=True)
        student = (z - total).masked_fill(~present, LOWEST_LOGIT)
        listed, of_tail = self.teacher.of_listed(self.rows), self.teacher.of_tail(self.rows, setting.vocabulary.size)
        if bucket := self.teacher.tail == 'bucket':
            buckets = Buckets(torch.log_softmax(torch.cat([student, tail - total], -1), -1), listed, *of_tail)
        else:
            buckets = Buckets(torch.log_softmax(student, -1), listed)
        value, gradient = buckets.compare(setting.divergence)
        tokens.sums[0] = value
        if tokens.kls is not None:
            self._in_detail(tokens, z, total, student, buckets, of_tail[1])

        gradient = gradient * tokens.weight[:, None].double()
        per_id = gradient[:, : z.shape[1]]
        if tokens.label_lse is not None:
            tokens.label_lse.copy_(self.label_lse(tokens))
            if tokens.label_weight is not None:
                softmax = (z * tokens.label_scale[:, None].double() - tokens.label_lse[:, None]).exp()
                one_hot = ids == tokens.label[:, None]
                per_id = per_id + (softmax - one_hot.double()) * tokens.label_weight[:, None]
        if setting.softcap:
            per_id = per_id * (1 - (z * setting.over_softcap).square())
        if not bucket:
            return None, per_id
        # Where all columns are listed (or masked) the student has no tail, and no columns to give its gradient to.
        per_tail = gradient[:, -1].masked_fill((tail - total)[:, 0] < LOWEST_LOGIT / 2, 0)
        return per_tail.to(tokens.weight.dtype), per_id

    def _in_detail(self, tokens: Tokens, z, total, student, buckets: Buckets, largest: Tensor) -> None:
        ids = self.ids
        for out, kind in zip(tokens.kls, ('forward_kl', 'reverse_kl'), strict=True):
            out.copy_(buckets.compare(Divergence(kind))[0])
        log_tail = tokens.lse[0] - total[:, 0]
        of_listed = torch.linalg.vecdot(student.exp(), student)
        tokens.entropy[0] = log_tail.exp() * (tokens.entropy[0] - log_tail) - of_listed
        tokens.entropy[1] = buckets.entropy()
        tokens.mass.copy_(student.exp().sum(-1))
        top = z.max(-1, keepdim=True).values
        best = ids.masked_fill(z < top, torch.iinfo(torch.long).max).amin(-1)
        of_tail = tokens.best[0]
        first = torch.where(top[:, 0] == tokens.top[0], torch.minimum(best, of_tail), of_tail)
        tokens.best[0] = torch.where(top[:, 0] > tokens.top[0], best, first)
        tokens.best[1] = ids.gather(1, buckets.listed.argmax(-1, keepdim=True))[:, 0]
        if tokens.label is not None:
            teacher = buckets.listed
            if self.teacher.power != 1:  # else the log-probabilities are normalised as they are
                teacher = teacher - torch.cat([teacher, largest], -1).logsumexp(-1, keepdim=True)
            tokens.label_prob.copy_((teacher.exp() * (ids == tokens.label[:, None])).sum(-1))


def _compare(divergence: Divergence, log_s: Tensor, log_t: Tensor, equal: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """D [rows] of log-probabilities [rows, buckets], and its gradient with respect to the student's logits.

    equal: [rows, 1], for a TVD, where the teacher's tail is whatever the student's is: |T - S| has a kink there, at which the slope a
    may be anything from -½ to ½. With the tail's share the listed T_i = (1-q)·p̂_i change, and it is the mean Σ p̂·a of theirs at
    which D does not change with q.
    """
    s, t = log_s.exp(), log_t.exp()
    scratch = Scratch(*(torch.empty_like(s) for _ in range(4)))
    found = columns(divergence, s, t.clone(), log_t - log_s, scratch)
    if equal is not None:
        mean = torch.linalg.vecdot(t[:, :-1], found.slope[:, :-1])[:, None] / t[:, :-1].sum(-1, keepdim=True)
        found.slope[:, -1:] = torch.where(equal, mean, found.slope[:, -1:])
        found = found._replace(centre=torch.linalg.vecdot(s, found.slope))
    return found.value, found.gradient(s, found.centre) * found.factor
