"""Output heads: from hidden states to a chunk of fp32 logits, and from a chunk's gradient back to the head's tensors.

A head is used a chunk of tokens at a time, so that its logits [tokens, vocab] never exist as a whole. Logits are fp32
from inputs of any precision (fp64 from fp64): rounding them to bf16 would cost more than the divergence of two close
models.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import memory
from .sharding import Reduce

# Stands for a logit of -inf: exp() of it is 0 beside any real logit, and differences of two of them are finite.
LOWEST_LOGIT = -1e30

# Rows of the head at a time on a CPU: its products are a sixth faster than whole ones, and what of the head must be
# converted to fp32 is small.
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: first `scale`, then `softcap`, each where the model has it.

        logits = softcap · tanh(scale · z / softcap)        or scale · z without a softcap

    Gemma 2, 3n and 4: softcap = `final_logit_softcapping`. Cohere: scale = `logit_scale`. Granite:
    scale = 1 / `logits_scaling`. docs_en/loss.md lists the families.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f'softcap must be positive or None, got {self.softcap}')


@contextmanager
def _bf16_products():
    """On a CPU: fp32 matrix products round their inputs to bf16 and keep an fp32 result.

    For inputs that are bf16 already nothing is rounded, and AMX is used where there is one; torch.mm(out_dtype=) is CUDA
    only. On other CPUs oneDNN ignores the setting, and the product takes as long as one of fp32, twice as long as one with
    a bf16 result on AVX512-BF16. The setting is one of the process, so it is put back at once.
    """
    matmul = torch.backends.mkldnn.matmul
    previous = matmul.fp32_precision
    matmul.fp32_precision = 'bf16'
    try:
        yield
    finally:
        matmul.fp32_precision = previous


@contextmanager
def _as_they_are():
    yield


class LinearHead:
    """Hidden states and their head: transform(hidden @ weightᵀ + bias + scaling·(hidden @ Aᵀ) @ Bᵀ) / temperature.

    hidden [tokens, dim], weight [vocab, dim], bias [vocab] or None, lora None or (A [rank, dim], B [vocab, rank],
    scaling); of the vocabulary only the first `columns` ids are used.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora,
        transform: LogitTransform | None,
        columns: int,
        temperature: float,
    ):
        self.hidden, self.columns = hidden, columns
        self.tensors = (hidden, weight, bias, *(lora[:2] if lora is not None else (None, None)))
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            weight = weight.to(hidden.dtype)  # fp32 master weights under autocast: the model's own product does the same
        self.weight = weight[:columns]
        self.bias = None if bias is None else bias[:columns]
        self.lora = None if lora is None else (lora[0], lora[1][:columns], lora[2])
        self.transform = transform or LogitTransform()
        self.temperature = temperature
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.plain = hidden.dtype == weight.dtype == self.dtype
        both_bf16 = hidden.dtype == weight.dtype == torch.bfloat16
        self.products = _bf16_products if both_bf16 and hidden.device.type == 'cpu' else _as_they_are

    def with_tensors(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> 'LinearHead':
        lora = None if a is None else (a, b, self.lora[2])
        return LinearHead(hidden, weight, bias, lora, self.transform, self.columns, self.temperature)

    @property
    def softcap(self) -> float | None:
        return self.transform.softcap

    @property
    def slope(self) -> float:
        """d(logit)/d(product), the softcap's tanh' left out."""
        return self.transform.scale

    def logits(self, rows: slice, out: Tensor) -> None:
        """Fill out [rows, columns] (of `self.dtype`, each row contiguous)."""
        x = self.hidden[rows].detach()
        alpha = self.transform.scale / (self.softcap or self.temperature)
        weight = self.weight.detach()
        if not x.is_cuda or x.dtype != weight.dtype:
            self._product_in_blocks(x.to(self.dtype), weight, alpha, out)
        elif self.plain:
            torch.addmm(out, x, weight.t(), beta=0, alpha=alpha, out=out)
        else:
            torch.addmm(out, x, weight.t(), out_dtype=torch.float32, beta=0, alpha=alpha, out=out)
        if self.lora is not None:
            a, b, scaling = self.lora
            out.addmm_(x.to(self.dtype) @ a.detach().to(self.dtype).t(), b.detach().to(self.dtype).t(), alpha=alpha * scaling)
        if self.bias is not None:
            out.add_(self.bias.detach().to(self.dtype).clamp_min(LOWEST_LOGIT) * alpha)
        if self.softcap:
            out.tanh_().mul_(self.softcap / self.temperature)

    def _product_in_blocks(self, x: Tensor, weight: Tensor, alpha: float, out: Tensor) -> None:
        converted = None if self.plain else torch.empty(_BLOCK_ROWS, x.shape[1], dtype=self.dtype, device=x.device)
        with self.products():
            for start in range(0, len(weight), _BLOCK_ROWS):
                part, into = weight[start : start + _BLOCK_ROWS], out[:, start : start + _BLOCK_ROWS]
                if converted is not None:
                    part = converted[: len(part)].copy_(part)
                if self.plain:
                    torch.addmm(into, x, part.t(), beta=0, alpha=alpha, out=into)
                else:  # oneDNN's product takes a fifth longer with a factor than without; the block is in the cache
                    torch.mm(x, part.t(), out=into)
                    into.mul_(alpha)


def linear_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, lora=None, transform: LogitTransform | None = None
) -> Tensor:
    """The logits as a whole, [tokens, vocab] in fp32 (fp64 from fp64); for few tokens. They carry no gradient.

    Args:
        hidden: [tokens, dim].
        weight: [vocab, dim].
        bias: [vocab], added to the products.
        lora: (A [rank, dim], B [vocab, rank], scaling), a low-rank term of the head.
        transform: what the model does to its logits after the head.
    """
    head = LinearHead(hidden, weight, bias, lora, transform, len(weight), temperature=1.0)
    logits = torch.empty(len(hidden), len(weight), dtype=head.dtype, device=hidden.device)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head.logits(slice(None), logits)
        if bias is not None and not head.softcap:
            logits.masked_fill_(bias == -torch.inf, -torch.inf)
    return logits


class HeadGradients:
    """Gradients of a LinearHead, summed over the chunks: those `wanted` of (hidden, weight, bias, A, B).

    Half-precision products take the chunk's gradient in half precision, `narrow`. It is kept until there is enough of it
    for a product, see `tokens_per_product`.
    """

    def __init__(self, head: LinearHead, wanted: tuple[bool, ...], reduce: Reduce):
        self.head, self.reduce = head, reduce
        self.want_hidden, self.want_weight, self.want_bias, self.want_a, self.want_b = wanted
        hidden, vocab = head.hidden, len(head.tensors[1])
        halves = hidden.dtype == head.weight.dtype and (hidden.dtype == torch.bfloat16 or hidden.is_cuda)
        products = self.want_hidden or self.want_weight
        # bf16 for fp16 inputs too: of a gradient over 150,000 columns most is below the smallest number of fp16.
        self.narrow = torch.bfloat16 if halves and products and not head.plain else None
        # What is not a product with hidden or weight is made of the gradient in `head.dtype`, chunk by chunk.
        self.wide = self.narrow is None or self.want_bias or head.lora is not None
        self.kept, self.room = None, slice(0, 0)  # gradients of the slice's tokens, one after another
        self.hidden = self.weight = self.bias = self.a = self.b = None
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
            if rows.stop == self.room.stop:
                self._add_products(self.room, self._kept(self.room))
        if self.want_bias:
            self.bias[: self.head.columns] += gradient.sum(0)
        if self.head.lora is not None:
            self._add_low_rank(rows, gradient)

    def _keep(self, rows: slice) -> Tensor:
        """The place of a chunk's gradient in `kept`."""
        head = self.head
        if self.kept is None:
            # The gradient of a head in another precision, fp32 weights under autocast say, is a sum in any case.
            replaces_sum = self.want_weight and head.tensors[1].dtype == self.narrow
            shape, device = head.hidden.shape, head.hidden.device.type
            tokens = rows.stop if self.wide else tokens_per_product(*shape, rows.stop, device, replaces_sum)
            self.kept = memory.Rows(tokens, head.columns, self.narrow, head.hidden.device)
        if rows.start == self.room.stop:
            self.room = slice(rows.start, min(rows.start + len(self.kept), len(head.hidden)))
        return self._kept(rows)

    def _kept(self, rows: slice) -> Tensor:
        return self.kept[slice(rows.start - self.room.start, rows.stop - self.room.start)]

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
            for start in range(0, len(weight), _BLOCK_ROWS):
                part = weight[start : start + _BLOCK_ROWS]
                total.addmm_(gradient[:, start : start + len(part)], part.to(head.dtype))
            into.copy_(total)

    def _add_weight(self, rows: slice, gradient: Tensor) -> None:
        head, add = self.head, rows.start > 0
        x, like = head.hidden[rows].detach().to(gradient.dtype), head.tensors[1]
        if not add:
            whole = rows.stop == len(head.hidden) and like.dtype == self.narrow  # no sum that would need fp32
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

    def finish(self) -> tuple[Tensor | None, ...]:
        """(hidden, weight, bias, A, B) in the dtypes of their tensors, but of fp16 tensors in fp32: a loss scale comes
        later. Those not wanted are None."""
        head, self.kept = self.head, None
        if self.want_weight and self.weight is None:  # there were no tokens
            self.weight = torch.zeros_like(head.tensors[1])
        for shared in (self.hidden, self.a):
            if shared is not None:
                self.reduce.sum(shared)
        found = (self.hidden, self.weight, self.bias, self.a, self.b)
        return tuple(None if g is None else _converted(g, _before_scaling(like)) for g, like in zip(found, head.tensors, strict=False))


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
    product = torch.empty(min(_BLOCK_ROWS, len(into)), x.shape[1], dtype=x.dtype)
    for start in range(0, len(into), _BLOCK_ROWS):
        part = into[start : start + _BLOCK_ROWS]
        found = torch.mm(gradient[:, start : start + len(part)].t(), x, out=product[: len(part)])
        part.add_(found) if add else part.copy_(found)


def _before_scaling(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor's gradient until the backward pass has scaled it: fp16 has no room for it before."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def _converted(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.dtype == dtype:
        return gradient
    return memory.empty(*gradient.shape, dtype=dtype, device=gradient.device).copy_(gradient)


class ReadyLogits:
    """A head whose logits [tokens, vocab] exist already."""

    softcap = None
    slope = 1.0

    def __init__(self, logits: Tensor, columns: int, temperature: float):
        self.hidden, self.columns, self.temperature = logits, columns, temperature
        self.tensors = (logits,)
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def logits(self, rows: slice, out: Tensor) -> None:
        out.copy_(self.hidden[rows, : self.columns].detach()).clamp_min_(LOWEST_LOGIT)
        if self.temperature != 1:
            out.mul_(1 / self.temperature)


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

    def finish(self) -> tuple[Tensor]:
        return (self.gradient,)
