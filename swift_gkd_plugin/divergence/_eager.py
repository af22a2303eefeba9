"""The sweeps by torch operations: thirty or so passes over a block, for any dtype and device."""

import torch
from torch import Tensor

from .kinds import Divergence, Scratch, columns
from .sweeps import Logits, Setting, Sweeps, Tokens

# Rows are worked on a few at a time, so that on a CPU the elementwise buffers stay in the last-level cache.
_BLOCK_ELEMENTS = {'cpu': 1 << 19, 'cuda': 1 << 25}


class Eager(Sweeps):
    """Probabilities, and the slope of the divergence that was summed last, are kept for the gradient."""

    in_place = True

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.memory: dict[str, Tensor] = {}

    def rows(self, chunk: int) -> int:
        if self.setting.vocabulary.reduce.group is not None:
            return chunk  # the group's reductions are per block
        budget = _BLOCK_ELEMENTS['cpu' if self.setting.device.type == 'cpu' else 'cuda']
        return max(1, min(chunk, budget // max(self.setting.vocabulary.columns, 1)))

    def normalise(self, logits: Logits, tokens: Tokens) -> None:
        self.local = torch.empty_like(tokens.lse)
        for side, z in enumerate((logits.student, logits.teacher)):
            if z is None:
                continue
            if side and logits.difference:
                z = torch.add(logits.student, z, out=self._buffer('teacher logits', len(z)))
            top, best = z.max(-1) if tokens.best is not None else (z.amax(-1), None)
            p = torch.softmax(z, -1, out=self._buffer(f'p{side}', len(z)))
            # Read off the largest probability, so that one fused softmax is all the work.
            self.local[side] = top.double() - p.amax(-1).double().log()
            if best is not None:
                tokens.top[side], tokens.best[side] = top, best + self.setting.vocabulary.first_id
                tokens.entropy[side] = -torch.sub(z, self.local[side][:, None].to(z.dtype), out=self._buffer('e', len(z))).mul_(p).sum(-1)
        tokens.lse.copy_(self.local)
        if tokens.label_lse is not None:
            same = self.setting.label_scale == 1
            tokens.label_lse.copy_(self.local[0] if same else self._normalise_for_labels(logits.student, tokens.label_scale))

    def _normalise_for_labels(self, z: Tensor, scale: Tensor) -> Tensor:
        top = z.amax(-1)
        p = torch.sub(z, top[:, None], out=self._buffer('p of labels', len(z)))
        total = p.mul_(scale[:, None]).exp_().sum(-1, dtype=torch.float64)
        self.label_top = top.double() * scale.double()
        return self.label_top + total.log()

    def sums(self, divergence: Divergence, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        n = len(logits.student)
        self._normalise_over_group(tokens)
        log_ratio = self._buffer('log ratio', n)
        if logits.difference:
            log_ratio.copy_(logits.teacher)
        else:
            torch.sub(logits.teacher, logits.student, out=log_ratio)
        log_ratio.sub_((tokens.lse[1] - tokens.lse[0]).to(log_ratio.dtype)[:, None])
        teacher = self._buffer('p1', n)
        if tokens.kls is not None:  # there will be other sums
            teacher = self._buffer('larger', n).copy_(teacher)
        scratch = Scratch(*(self._buffer(name, n) for name in 'eyhb'))
        self.found = columns(divergence, self._buffer('p0', n), teacher, log_ratio, scratch)
        out[0] = self.found.value
        if len(out) > 1:
            out[1] = self.found.centre

    def gradient(self, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        gradient = self.found.gradient(self._buffer('p0', len(out)), tokens.sums[1])
        self._finish(gradient, tokens.weight * self.found.factor, logits, tokens, out)

    def tail_gradient(self, logits: Logits, tokens: Tokens, tail_weight: Tensor | None, out: Tensor) -> None:
        self._normalise_over_group(tokens)
        self._finish(self._buffer('p0', len(out)), tail_weight, logits, tokens, out)

    def _finish(self, gradient: Tensor, weight: Tensor | None, logits: Logits, tokens: Tokens, out: Tensor) -> None:
        """weight·gradient, the cross-entropy's added, times the softcap's derivative."""
        setting, n = self.setting, len(out)
        total = self._buffer('h', n) if setting.softcap else out  # which is in the place of the logits
        if weight is None:
            total.zero_()
        else:
            torch.mul(gradient, weight[:, None], out=total)
        if tokens.label_weight is not None:
            same = setting.label_scale == 1
            p, norm = (self._buffer('p0', n), tokens.lse[0]) if same else (self._buffer('p of labels', n), self.label_top)
            factor = (norm - tokens.label_lse).exp().to(p.dtype) * tokens.label_weight
            total.addcmul_(p, factor[:, None])
            column, here = setting.vocabulary.find(tokens.label[:, None])
            total.scatter_add_(1, column, -(tokens.label_weight[:, None] * here))
        if setting.softcap:  # d tanh = 1 - tanh², and the logits are softcap·tanh / temperature
            out.mul_(setting.over_softcap).square_().neg_().add_(1).mul_(total)

    def _normalise_over_group(self, tokens: Tokens) -> None:
        """What was normalised over the columns here, over those of the group."""
        if self.setting.vocabulary.reduce.group is not None:
            for side, factor in enumerate((self.local - tokens.lse).exp()):
                p = self._buffer(f'p{side}', factor.shape[0])
                p.mul_(factor[:, None].to(p.dtype))
            self.local = tokens.lse.clone()

    def _buffer(self, name: str, rows: int) -> Tensor:
        if name not in self.memory or len(self.memory[name]) < rows:
            shape = rows, self.setting.vocabulary.columns
            self.memory[name] = torch.empty(shape, dtype=self.setting.dtype, device=self.setting.device)
        return self.memory[name][:rows]
