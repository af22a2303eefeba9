"""From chunks of the gradient with respect to the logits back to the tensors of a head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import memory
from .heads import BLOCK_ROWS, LinearHead, ReadyLogits
from .sharding import Reduce


class Kept:
    """Gradients of several chunks' logits in half precision, one after another, until there are enough for a product."""

    def __init__(self, tokens: int, columns: int, total: int, dtype: torch.dtype, device: torch.device):
        self.memory = memory.Rows(tokens, columns, dtype, device)
        self.total = total  # tokens of the call
        self.room = slice(0, 0)  # the tokens there is room for

    def place(self, rows: slice) -> Tensor:
        """The place of the chunk `rows`, each once and in order."""
        if rows.start == self.room.stop:
            self.room = slice(rows.start, min(rows.start + len(self.memory), self.total))
        return self[rows]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.memory[rows.start - self.room.start : rows.stop - self.room.start]

    def is_full(self, rows: slice) -> bool:
        """After the chunk `rows`."""
        return rows.stop == self.room.stop


class HeadGradients:
    """Gradients of a LinearHead, summed over the chunks: those `wanted` of (hidden, weight, bias, A, B).

    Half-precision products take the chunk's gradient in half precision, `narrow`. It is kept until there is enough of it
    for a product, see `tokens_per_product`. Where it is kept of all tokens and the head's product is `late`, that is left to
    `Found.scaled`.
    """

    def __init__(self, head: LinearHead, wanted: tuple[bool, ...], reduce: Reduce, late: bool):
        self.head, self.reduce, self.late = head, reduce, late
        self.want_hidden, self.want_weight, self.want_bias, self.want_a, self.want_b = wanted
        hidden, vocab = head.hidden, len(head.tensors[1])
        halves = hidden.dtype == head.weight.dtype and (hidden.dtype == torch.bfloat16 or hidden.is_cuda)
        products = self.want_hidden or self.want_weight
        # bf16 for fp16 inputs too: of a gradient over 150,000 columns most is below the smallest number of fp16.
        self.narrow = torch.bfloat16 if halves and products and not head.plain else None
        # What is not a product with hidden or weight is made of the gradient in `head.dtype`, chunk by chunk.
        self.wide = self.narrow is None or self.want_bias or head.lora is not None
        self.kept: Kept | None = None
        self.hidden = self.weight = self.bias = self.a = self.b = self.waiting = None
        if self.want_hidden:
            dtype = head.dtype if reduce.group else _before_scaling(hidden)
            self.hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        if self.want_bias:
            self.bias = torch.zeros(vocab, dtype=head.dtype, device=hidden.device)
        if self.want_a:
            self.a = torch.zeros(head.lora[0].shape, dtype=head.dtype, device=hidden.device)
        if self.want_b:
            self.b = torch.zeros(vocab, head.lora[1].shape[1], dtype=head.dtype, device=hidden.device)

    def place(self, rows: slice, logits: Tensor) -> Tensor:
        """Where the gradient of a chunk with these `logits` [rows, columns] is to be written: in their place, or in half
        precision where nothing needs more."""
        return logits if self.wide else self._keep(rows)

    def add(self, rows: slice, gradient: Tensor) -> None:
        """gradient: [rows, columns], of hidden @ weightᵀ + …, in `head.dtype`, or what was written into `place`."""
        if self.narrow is None:
            self._add_products(rows, gradient)
        else:
            if gradient.dtype != self.narrow:
                self._keep(rows).copy_(gradient)
            if self.kept.is_full(rows):
                self._add_products(self.kept.room, self.kept[self.kept.room])
        if self.want_bias:
            self.bias[: self.head.columns] += gradient.sum(0)
        if self.head.lora is not None:
            self._add_low_rank(rows, gradient)

    def _keep(self, rows: slice) -> Tensor:
        head = self.head
        if self.kept is None:
            # The gradient of a head in another precision, fp32 weights under autocast say, is a sum in any case.
            replaces_sum = self.want_weight and head.tensors[1].dtype == self.narrow
            shape, device = head.hidden.shape, head.hidden.device
            tokens = rows.stop if self.wide else tokens_per_product(*shape, rows.stop, device.type, replaces_sum)
            self.kept = Kept(tokens, head.columns, len(head.hidden), self.narrow, device)
        return self.kept.place(rows)

    def _add_products(self, rows: slice, gradient: Tensor) -> None:
        """gradient: [rows, columns], in `narrow` if that is not None, else in `head.dtype`."""
        if self.want_hidden:
            self._add_hidden(rows, gradient)
        if self.want_weight:
            self._add_weight(rows, gradient)

    def _add_hidden(self, rows: slice, gradient: Tensor) -> None:
        head, into = self.head, self.hidden[rows]
        weight = head.weight.detach()
        if self.narrow is not None:
            weight = weight.to(self.narrow)
        if gradient.dtype == weight.dtype == into.dtype:
            torch.mm(gradient, weight, out=into)
        elif gradient.dtype == weight.dtype and gradient.is_cuda:
            torch.mm(gradient, weight, out_dtype=into.dtype, out=into)
        elif gradient.dtype == weight.dtype:
            into.copy_(gradient @ weight)
        else:
            total = torch.zeros(into.shape, dtype=head.dtype, device=into.device)
            for start in range(0, len(weight), BLOCK_ROWS):
                part = weight[start : start + BLOCK_ROWS]
                total.addmm_(gradient[:, start : start + len(part)], part.to(head.dtype))
            into.copy_(total)

    def _add_weight(self, rows: slice, gradient: Tensor) -> None:
        head, add = self.head, rows.start > 0
        x, like = head.hidden[rows].detach().to(gradient.dtype), head.tensors[1]
        if not add:
            whole = rows.stop == len(head.hidden) and like.dtype == self.narrow  # no sum that would need fp32
            if whole and self.late:
                self.waiting = gradient
                return
            self.weight = memory.empty(*like.shape, dtype=like.dtype if whole else head.dtype, device=like.device)
            self.weight[head.columns :].zero_()
        into = self.weight[: head.columns]
        if gradient.dtype == into.dtype:
            torch.addmm(into, gradient.t(), x, beta=int(add), out=into)
        elif not gradient.is_cuda:
            _add_product_in_blocks(into, gradient, x, add)
        else:
            torch.addmm(into, gradient.t(), x, beta=int(add), out_dtype=into.dtype, out=into)

    def _add_low_rank(self, rows: slice, gradient: Tensor) -> None:
        head = self.head
        a, b, scaling = head.lora
        a, b, x = (t.detach().to(head.dtype) for t in (a, b, head.hidden[rows]))
        if self.want_hidden:
            self.hidden[rows] += scaling * (gradient @ b) @ a
        if self.want_b:
            self.b[: head.columns].addmm_(gradient.t(), x @ a.t(), alpha=scaling)
        if self.want_a:
            self.a.addmm_((gradient @ b).t(), x, alpha=scaling)

    def finish(self) -> 'Found':
        head, self.kept = self.head, None
        if self.want_weight and self.weight is None and self.waiting is None:  # there were no tokens
            self.weight = torch.zeros_like(head.tensors[1])
        for shared in (self.hidden, self.a):
            if shared is not None:
                self.reduce.sum(shared)
        found = (self.hidden, self.weight, self.bias, self.a, self.b)
        return Found(found, self.waiting, None if self.waiting is None else head.hidden.detach())


@dataclass(frozen=True)
class Found:
    """The gradients of a sum of losses, which are still to be multiplied by that of the sum. Those that are fp32 sums stay fp32
    until then, so that scale and dtype are changed in one pass, and fp16 has room for them."""

    sums: tuple[Tensor | None, ...]  # in the order of the head's tensors; None for those not wanted, and for a head's that waits
    waiting: Tensor | None = None  # [tokens, columns], the gradient with respect to the products, of all tokens
    hidden: Tensor | None = None  # [tokens, dim], to be multiplied by it

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.sums, self.waiting, self.hidden

    @classmethod
    def of(cls, tensors: tuple[Tensor | None, ...]) -> 'Found':
        return cls(tensors[:-2], *tensors[-2:])

    def scaled(self, by: Tensor | None, like: list[tuple[torch.Size, torch.dtype] | None]) -> list[Tensor | None]:
        """Times `by`, a scalar or [tokens, 1], in the shapes and dtypes of `like`: in place where they have them. None: as they are,
        of which none waits."""
        out = [None if g is None else _scaled(g, by, of[1]) for g, of in zip(self.sums, like, strict=False)]
        if self.waiting is not None:
            shape, dtype = like[1]
            out[1] = memory.empty(*shape, dtype=dtype, device=self.waiting.device)
            out[1][self.waiting.shape[1] :].zero_()
            # The hidden states are a hundred times smaller than the product is. In fp32: fp16 has not the range of a loss scale.
            torch.mm(self.waiting.t(), (self.hidden.float() * by).to(self.waiting.dtype), out=out[1][: self.waiting.shape[1]])
        return out


def _scaled(gradient: Tensor, by: Tensor | None, dtype: torch.dtype) -> Tensor:
    if gradient.dtype == dtype:
        return gradient if by is None else gradient.mul_(by)
    out = memory.empty(*gradient.shape, dtype=dtype, device=gradient.device)
    return out.copy_(gradient) if by is None else torch.mul(gradient, by, out=out)


def tokens_per_product(tokens: int, dim: int, chunk: int, device: str, replaces_sum: bool) -> int:
    """Of how many tokens the gradient is kept in half precision: all, or some chunks.

    With a trained head each product reads and writes the fp32 sum of them, as large as the half-precision gradients of
    2·dim tokens: up to there all are kept and there is no sum. Beyond, and with a frozen head: a chunk's on a CPU; on a
    GPU, of which a product of one chunk leaves much idle, four chunks', in the memory of a chunk's two blocks of logits.
    """
    if replaces_sum and tokens <= 2 * dim:
        return tokens
    return chunk if device == 'cpu' else min(tokens, 4 * chunk)


def _add_product_in_blocks(into: Tensor, gradient: Tensor, x: Tensor, add: bool) -> None:
    """into (+)= gradientᵀ @ x, with bf16 products. Each chunk's is rounded to bf16, as the whole gradient is in the
    end; their sum is fp32. A product with an fp32 result, of inputs made fp32 as for the logits, takes twice as long."""
    product = torch.empty(min(BLOCK_ROWS, len(into)), x.shape[1], dtype=x.dtype)
    for start in range(0, len(into), BLOCK_ROWS):
        part = into[start : start + BLOCK_ROWS]
        found = torch.mm(gradient[:, start : start + len(part)].t(), x, out=product[: len(part)])
        part.add_(found) if add else part.copy_(found)


def _before_scaling(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor's gradient until the backward pass has scaled it: fp16 has no room for it before."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


class ReadyGradients:
    """The gradient of ReadyLogits, in the logits' dtype, fp32 for fp16; zero beyond the common columns."""

    def __init__(self, head: ReadyLogits):
        self.head = head
        self.gradient = torch.empty_like(head.hidden, dtype=_before_scaling(head.hidden))
        self.gradient[:, head.columns :].zero_()

    def place(self, rows: slice, logits: Tensor) -> Tensor:
        return logits

    def add(self, rows: slice, gradient: Tensor) -> None:
        self.gradient[rows, : self.head.columns].copy_(gradient)

    def finish(self) -> Found:
        return Found((self.gradient,))
