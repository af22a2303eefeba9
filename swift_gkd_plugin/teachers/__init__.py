"""What a teacher says about the n trained tokens of a micro-batch, whatever it is and wherever it runs.

Full logits are never kept: a local teacher hands over the hidden states in front of its output head, a remote one its k largest
log-probabilities (design of KDFlow and NeMo-RL; a hidden state is about 74 times smaller than a row of logits).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True)
class HiddenStates:
    """Attributes:
    hidden: [n, teacher_dim], in the dtype of the teacher.
    head: The teacher's output head; what it is depends on the back end.
    reference: What the student's base says, with ``--gkd_extrapolation``; the loss puts the two together.
    """

    hidden: torch.Tensor
    head: Any
    reference: HiddenStates | Logits | None = None


@dataclass(frozen=True)
class Logits:
    """Attributes:
    logits: [n, teacher_vocab]; from a teacher whose head can't be intercepted.
    reference: As of :class:`HiddenStates`.
    """

    logits: torch.Tensor
    reference: HiddenStates | Logits | None = None


@dataclass(frozen=True)
class TopK:
    """Attributes:
    logprobs: [n, k] float32; -inf fills ragged rows.
    ids: [n, k] int64.
    temperature: At which they were taken; None for that of the divergence. A local teacher's are normalised over the common
        vocabulary, a server's (at 1) over its own.
    tail: [n] float32, logarithm of the mass of what is not listed, summed over just that (1 minus the rest would be rounded); None from a
        server.
    """

    logprobs: torch.Tensor
    ids: torch.Tensor
    temperature: float | None = None
    tail: torch.Tensor | None = None


@dataclass(frozen=True)
class TopKOptions:
    """What is kept of a local teacher with ``--gkd_logits_topk``.

    Attributes:
        k: Log-probabilities per token.
        temperature: At which they are taken.
        vocab_size: Number of leading ids over which they are normalised; None for all.
    """

    k: int
    temperature: float
    vocab_size: int | None


Signal = HiddenStates | Logits | TopK


def split(signal: Signal, lengths: list[int]) -> list[Signal]:
    """The signals of consecutive tokens, so many each; tokens beyond them are left out."""
    tensors = {f.name: value for f in fields(signal) if isinstance(value := getattr(signal, f.name), torch.Tensor)}
    parts = {name: value[: sum(lengths)].split(lengths) for name, value in tensors.items()}
    return [replace(signal, **{name: values[i] for name, values in parts.items()}) for i in range(len(lengths))]


def joined(parts: list[Signal]) -> Signal:
    """One signal for the tokens of several, one after the other."""
    names = [f.name for f in fields(parts[0]) if isinstance(getattr(parts[0], f.name), torch.Tensor)]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
