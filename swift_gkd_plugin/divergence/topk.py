"""A teacher of which only k log-probabilities per token are known.

**Buckets.** The k ids are k buckets and everything else is one more, for both sides: the tail. Merging columns never
makes a divergence larger, so the value is a lower bound of the full one, and student mass outside the teacher's ids has
a gradient. With `tail='renormalize'` there is no tail bucket: both sides are renormalised over the k ids, and the value
and the gradient say nothing of the mass outside.

**The teacher's tail.** Without `tail_logprobs` all that is known of its mass is 1 - Σ of the k probabilities, a difference
that fp32 rounds: for a confident teacher it comes out as 0 or below, and a student's tail of 1e-4 would be 1e4 nats off in
KL(S‖T). So the mass, where it is small, is taken to lie within `_SLACK` of that difference, and what counts is the mass in
that range which is nearest to the student's. The value then stays a lower bound of the full one.

**Temperature.** The log-probabilities were taken at a temperature τ, and the divergence is wanted at another one, T.
The tail's mass at T cannot be known. So both sides are bucketed at τ, and the k+1 buckets are then tempered: p_i^(τ/T),
renormalised. Without a tail this is softmax(z/T) over the k ids. With one the value is no lower bound at T < τ: tempered as one
number, a tail of many columns keeps more mass than they would.

**Gradient.** Let B_i be the student's bucket log-probabilities, g_i = ∂D/∂B_i (it sums to 0), and S its columns at τ.
Then, with ∂B_i/∂(z_v/τ) = δ_iv - S_v for an id and [v in tail]·S_v/S_tail - S_v for the tail,

    ∂D/∂(z_v/τ) = g_i where v is the id i,        g_tail · S_v/S_tail where v is in the tail.

S_v/S_tail is a softmax over the tail's logits, finite however small S_tail is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .kinds import Divergence, Scratch, columns
from .sweeps import LOWEST_LOGIT, Setting, Tokens

# How far 1 - Σ of a teacher's k probabilities may be from its tail's mass. torch's log_softmax over 151,936 fp32 logits is off
# by up to 2e-5 on a CPU: beside one large probability most of a tail is lost in the running sum.
_SLACK = 2.0**-15
# A tail so many times larger is taken as it is: its logarithm is hardly off, and neither is the divergence.
KNOWN = 32


@dataclass(frozen=True)
class TopKTeacher:
    """logprobs, ids: [tokens, k], ids -1 where an entry does not count; tail_logprobs: [tokens] log of the mass of what is not
    listed, or None."""

    logprobs: Tensor
    ids: Tensor
    tail: str
    tail_logprobs: Tensor | None

    @classmethod
    def of(cls, logprobs: Tensor, ids: Tensor, tail: str, tail_logprobs: Tensor | None, vocab_size: int) -> 'TopKTeacher':
        """An entry counts where its log-probability is finite and its id in [0, vocab_size)."""
        if not ids.shape[1]:  # one that does not count is less trouble than none
            logprobs, ids = logprobs.new_full((len(ids), 1), -torch.inf), ids.new_full((len(ids), 1), -1)
        counts = (ids >= 0) & (ids < vocab_size) & (logprobs > -torch.inf)
        # In memory as kernels read them, one after the other.
        given = None if tail_logprobs is None else tail_logprobs.contiguous()
        return cls(logprobs.contiguous(), ids.masked_fill(~counts, -1).contiguous(), tail, given)

    @property
    def slack(self) -> float:
        """How far 1 - Σ of the k probabilities may be from the tail's mass."""
        eps = torch.finfo(self.logprobs.dtype).eps
        return 4 * eps if self.logprobs.dtype == torch.float64 else max(_SLACK, 4 * eps)

    def tail_range(self, rows: slice, counted: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest log-mass [rows, 1] that the tail can have, LOWEST_LOGIT for none. counted: [rows, k] the
        log-probabilities in fp64, LOWEST_LOGIT of entries that are not `present`."""
        if self.tail_logprobs is None:
            mass = -torch.expm1(torch.logsumexp(counted, -1, keepdim=True))
            slack = torch.where(mass > KNOWN * self.slack, 0.0, self.slack)
            return tuple(x.clamp(0, 1).log().clamp_min(LOWEST_LOGIT) for x in (mass - slack, mass.clamp_min(0) + slack))
        elsewhere = self.logprobs[rows].double().masked_fill(present, -torch.inf)  # an id that the student lacks is tail, too
        tail = torch.cat([self.tail_logprobs[rows, None].double(), elsewhere], -1).logsumexp(-1, keepdim=True)
        tail = tail.clamp_min(LOWEST_LOGIT).masked_fill(~present.any(-1, keepdim=True), 0)
        return tail, tail


@dataclass
class Listed:
    """A block's entries, and the student's logits [rows, k] of their ids."""

    teacher: TopKTeacher
    rows: slice
    logits: Tensor

    @property
    def ids(self) -> Tensor:
        return self.teacher.ids[self.rows]

    def compare(self, setting: Setting, tokens: Tokens) -> tuple[Tensor | None, Tensor]:
        """D into `tokens.sums`, and the statistics. `tokens` know of the student's tail so far, and are told of the whole.

        Returns the gradient of the block's loss with respect to the head's products: the tail's [rows] as a factor of the
        softmax over it, None for none; and that of each entry [rows, k]. The buckets are few, so their arithmetic is in fp64.
        """
        ids = self.ids
        present = ids >= 0
        listed = teacher = self.teacher.logprobs[self.rows].double().masked_fill(~present, LOWEST_LOGIT)
        z = self.logits.double().masked_fill(~present, LOWEST_LOGIT)
        tail = tokens.lse[0][:, None]
        total = torch.cat([z, tail], -1).logsumexp(-1, keepdim=True)
        student = (z - total).masked_fill(~present, LOWEST_LOGIT)
        sharpening = setting.temperature / setting.divergence.temperature
        bucket = self.teacher.tail == 'bucket'
        if bucket:
            student = torch.cat([student, tail - total], -1)
            least, largest = self.teacher.tail_range(self.rows, teacher, present)
            teacher = torch.cat([teacher, nearest_tail(student, teacher, least, largest, sharpening)], -1)
        log_s, log_t = (torch.log_softmax(side * sharpening, -1) for side in (student, teacher))
        value, gradient = _buckets(setting.divergence, log_s, log_t)
        tokens.sums[0] = value
        if tokens.kls is not None:
            self._in_detail(tokens, z, total, student, listed, log_s, log_t)

        weight = tokens.weight[:, None].double()
        gradient = gradient * (sharpening * weight)
        per_id = gradient[:, : z.shape[1]]
        if tokens.label_lse is not None:
            at_one = z * setting.to_one
            tokens.label_lse.copy_(torch.logaddexp(tokens.label_lse, at_one.logsumexp(-1)))
            if tokens.label_weight is not None:
                softmax = (at_one - tokens.label_lse[:, None]).exp()
                one_hot = ids == tokens.label[:, None]
                per_id = per_id + (softmax - one_hot.double()) * tokens.label_weight[:, None]
        if setting.softcap:
            per_id = per_id * (1 - (z * (setting.temperature / setting.softcap)).square())
        if not bucket:
            return None, per_id
        # Where all columns are listed (or masked) the student has no tail, and no columns to give its gradient to.
        per_tail = gradient[:, -1].masked_fill(student[:, -1] < LOWEST_LOGIT / 2, 0)
        return per_tail.to(tokens.weight.dtype), per_id

    def _in_detail(self, tokens: Tokens, z, total, student, teacher, log_s: Tensor, log_t: Tensor) -> None:
        k, ids = z.shape[1], self.ids
        for out, kind in zip(tokens.kls, ('forward_kl', 'reverse_kl'), strict=True):
            out.copy_(_buckets(Divergence(kind), log_s, log_t)[0])
        log_tail = tokens.lse[0] - total[:, 0]
        listed = torch.linalg.vecdot(student[:, :k].exp(), student[:, :k])
        tokens.entropy[0] = log_tail.exp() * (tokens.entropy[0] - log_tail) - listed
        tokens.entropy[1] = -torch.linalg.vecdot(log_t.exp(), log_t)
        tokens.mass.copy_(student[:, :k].exp().sum(-1))
        top = z.max(-1, keepdim=True).values
        best = ids.masked_fill(z < top, torch.iinfo(torch.long).max).amin(-1)
        of_tail = tokens.best[0]
        first = torch.where(top[:, 0] == tokens.top[0], torch.minimum(best, of_tail), of_tail)
        tokens.best[0] = torch.where(top[:, 0] > tokens.top[0], best, first)
        tokens.best[1] = ids.gather(1, teacher.argmax(-1, keepdim=True))[:, 0]
        if tokens.label is not None:
            tokens.label_prob.copy_((teacher.exp() * (ids == tokens.label[:, None])).sum(-1))


def _buckets(divergence: Divergence, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """D [rows] of log-probabilities [rows, buckets], and its gradient with respect to the student's logits."""
    s, t = log_s.exp(), log_t.exp()
    scratch = Scratch(*(torch.empty_like(s) for _ in range(4)))
    found = columns(divergence, s, t, log_t - log_s, scratch)
    return found.value, found.gradient(s, found.centre) * found.factor


def nearest_tail(student: Tensor, listed: Tensor, least: Tensor, largest: Tensor, sharpening: float) -> Tensor:
    """The teacher's tail [rows, 1] whose share beside its `listed` buckets [rows, k] is nearest to that in the student's
    buckets [rows, k + 1], tail last, once both are tempered."""
    tempered = student * sharpening
    odds = tempered[:, -1:] - torch.logsumexp(tempered[:, :-1], -1, keepdim=True)
    same = (odds + torch.logsumexp(listed * sharpening, -1, keepdim=True)) / sharpening
    return torch.minimum(torch.maximum(same, least), largest)
