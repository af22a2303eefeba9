"""What depends on the rows of a step: how many tokens it has is known at most, what a layer keeps of one about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..divergence.chunks import chunk_tokens
from ..divergence.gradients import tokens_per_product
from ..responses.budget import default_tokens
from .sizes import Inside

BF16, FP32 = 2, 4
UNKNOWN_LENGTH = 2048  # tokens of a row where --max_length does not say; the printed table does


@dataclass(frozen=True)
class Rows:
    """What a step has on a rank, at most.

    Attributes:
        rows: Of a micro-batch.
        length: Tokens of a row.
        trained: Of them, of its response.
        micro_batches: Of a step.
        answers: Rows that are answered at a time, prompt and response ``length`` tokens; 0 if nobody answers in these processes.
        answers_of_teacher: Whether the teacher answers them too, or alone.
        budget: ``--gkd_generation_tokens``.
    """

    rows: int
    length: int
    trained: int
    micro_batches: int
    answers: int
    answers_of_teacher: bool
    budget: int | None

    @classmethod
    def of(cls, args: Any, rows: int, micro_batches: int) -> Rows:
        """Args: ms-swift's arguments, rows of a micro-batch, micro-batches of a step."""
        encoded = args.max_length or min(args.max_model_len or UNKNOWN_LENGTH, UNKNOWN_LENGTH)
        answers = args.lmbda > 0 or args.seq_kd
        longest = max(args.max_completion_length, (args.gkd_teacher_max_completion_length or 0) if args.seq_kd else 0)
        length = encoded + longest * answers
        generated = args.lmbda == 1 or args.seq_kd
        elsewhere = args.gkd_teacher_engine == 'vllm' or args.teacher_model_server is not None
        by_student, by_teacher = args.lmbda > 0 and not args.use_vllm, args.seq_kd and not elsewhere
        at_a_time = rows * micro_batches if by_student or by_teacher else 0
        return cls(rows, length, longest if generated else length, micro_batches, at_a_time, by_teacher, args.gkd_generation_tokens)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def trained_tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.trained


def layer_bytes(inside: Inside, tp: int = 1, sequence_parallel: bool = False) -> int:
    """What a layer keeps of a token for its backward pass, with flash attention: both norms' inputs in fp32, their results and the inputs
    of the products behind them; queries and keys before and after their norms and positions, values, the attention's result; four of
    the feed-forward's width. This is what transformers' Qwen3 keeps; fused kernels keep less, other families about as much."""
    b, shards = inside.itemsize, tp if sequence_parallel else 1
    wide = 2 * (FP32 + 2 * b) * inside.hidden // shards
    split = (FP32 + 3 * b) * (inside.queries + inside.keys) + 4 * b * inside.ffn + 2 * b * inside.routed * inside.hidden
    return wide + split // tp


def activation_bytes(inside: Inside, tokens: int, kept: int, whole: int, *, tp: int = 1, sequence_parallel: bool = False) -> int:
    """What a rank keeps of its layers for the backward pass.

    Args:
        tokens: Of a micro-batch, on this rank.
        kept: Layers, over the micro-batches under way, of which only the input is kept.
        whole: Layers of which everything is.
    """
    shards = tp if sequence_parallel else 1
    return tokens * (kept * inside.itemsize * inside.hidden // shards + whole * layer_bytes(inside, tp, sequence_parallel))


def forward_bytes(inside: Inside, tokens: int, tp: int = 1) -> int:
    """Of one layer at a time, without a backward pass."""
    widths = 4 * inside.hidden + (2 * inside.queries + 2 * inside.keys + 3 * inside.ffn) // tp
    return tokens * inside.itemsize * widths


def cache_bytes(per_token: int | None, answers: int, length: int, budget: int | None) -> int:
    """Keys and values of the responses under way: what fits the budget, or what there is if that is less.

    Args:
        per_token: On this rank.
        answers: Rows.
        length: Of a row, prompt and response.
    """
    tokens = answers * length
    if per_token is None:
        return 0
    return min(tokens, max(budget or default_tokens(per_token), length)) * per_token


def payload_bytes(width: int, tokens: int, k: int | None = None, itemsize: int = BF16) -> int:
    """What is kept of a teacher: hidden states of this width of the trained tokens, or k log-probabilities, their ids and the tail."""
    return tokens * (12 * k + FP32 if k else itemsize * width)


def operator_bytes(hidden: int, width: int, tokens: int, *, device: str = 'cuda', sharded: bool = False, trained: bool = True) -> int:
    """At most: two buffers of a chunk's logits, the gradients that wait in bf16 for a product, the gradient of the hidden states, and that
    of a trained head in bf16, where not all gradients wait for one product in fp32 too.

    Args:
        hidden: Of the student.
        width: Columns of this rank's vocabulary shard.
        tokens: Of a micro-batch.
        sharded: Whether the vocabulary is.
    """
    chunk = min(tokens, chunk_tokens(width, FP32, device))
    kept = tokens_per_product(tokens, hidden, chunk, device, trained)
    states = (FP32 + BF16 if sharded else BF16) * tokens * hidden
    head = (BF16 if kept == tokens else FP32 + BF16) * width * hidden * trained
    return (2 * FP32 * chunk + BF16 * kept) * width + states + head
