"""Output heads: from hidden states to a chunk of fp32 logits; `gradients.py` is the way back.

A head is used a chunk of tokens at a time, so that its logits [tokens, vocab] never exist as a whole. Logits are fp32
from inputs of any precision (fp64 from fp64): rounding them to bf16 would cost more than the divergence of two close
models.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .sweeps import LOWEST_LOGIT

# Rows of the head at a time on a CPU: its products are a sixth faster than whole ones, and what of the head must be
# converted to fp32 is small.
BLOCK_ROWS = 2048


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

    @property
    def may_mask(self) -> bool:
        """Whether a logit can stand for -inf."""
        return self.bias is not None

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
        converted = None if self.plain else torch.empty(BLOCK_ROWS, x.shape[1], dtype=self.dtype, device=x.device)
        with self.products():
            for start in range(0, len(weight), BLOCK_ROWS):
                part, into = weight[start : start + BLOCK_ROWS], out[:, start : start + BLOCK_ROWS]
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


class ReadyLogits:
    """A head whose logits [tokens, vocab] exist already."""

    softcap = None
    slope = 1.0
    may_mask = True

    def __init__(self, logits: Tensor, columns: int, temperature: float):
        self.hidden, self.columns, self.temperature = logits, columns, temperature
        self.tensors = (logits,)
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def logits(self, rows: slice, out: Tensor) -> None:
        out.copy_(self.hidden[rows, : self.columns].detach()).clamp_min_(LOWEST_LOGIT)
        if self.temperature != 1:
            out.mul_(1 / self.temperature)
