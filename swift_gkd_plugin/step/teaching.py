"""A local teacher's own micro-batches. It keeps nothing for a backward pass, so it can look at more rows at a time than the student.

All responses of a step are known before its first forward. Their rows are sorted by length over all micro-batches of the step, looked at in
few, full batches without much padding, and what the teacher says goes back to the micro-batches in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..teachers import Signal, joined, split
from .balance import size_of
from .ranks import Ranks
from .samples import Counted, InTurn, SampleEncoder

# What may be kept of a teacher at a time, in bytes of each rank; a step of more tokens takes several visits.
KEPT_BYTES = 2 << 30


def bytes_per_token(k: int | None, width: int) -> int:
    """Of what a teacher says: k log-probabilities with their ids, or at None hidden states of this width."""
    return 12 * k if k else 4 * width


@dataclass(frozen=True)
class TeacherBatches:
    """How large they are.

    Attributes:
        rows: At most, ``--gkd_teacher_batch_size``; None for as many as there are tokens for.
        tokens: At most, padding included (packed rows have none), where ``rows`` is None; a longer row is alone.
        lockstep: Ranks share the weights, so that all of them run the same number of batches.
        at_least: As many batches are wanted, to fill a pipeline or to give each of several replicas some.
        multiple: The number of batches has to be one of this.
        bytes_per_token: Of what is kept, where a step may take several visits; None where it has to be one.
    """

    rows: int | None
    tokens: int
    lockstep: bool = False
    at_least: int = 1
    multiple: int = 1
    bytes_per_token: int | None = None

    def grouped(self, lengths: list[int], packed: bool = False) -> list[list[int]]:
        """Places of rows of these lengths, the longest first, in groups.

        Args:
            packed: Rows come one after the other, without padding.
        """
        most = min(self.rows or len(lengths), max(len(lengths) // self.at_least, 1))
        tokens = self.tokens if self.at_least == 1 else min(self.tokens, -(-sum(lengths) // self.at_least))
        groups: list[list[int]] = []
        for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
            together = [lengths[other] for other in (*groups[-1], place)] if groups else []
            fits = len(together) - 1 < most if self.rows is not None else size_of(together, packed) <= tokens
            if groups and fits:
                groups[-1].append(place)
            else:
                groups.append([place])
        return groups

    def per_visit(self, batches: list[Counted], ranks: Ranks) -> int:
        """How many of a step's micro-batches one visit is for. A collective call in lockstep."""
        if self.bytes_per_token is None:
            return max(len(batches), 1)
        largest = max((batch.num_tokens for batch in batches), default=0)
        largest = ranks.at_most(largest) if self.lockstep else largest
        return max(KEPT_BYTES // max(largest * self.bytes_per_token, 1), 1)

    def taught(
        self,
        batches: list[Counted],
        encoder: SampleEncoder,
        ranks: Ranks,
        look: Callable[[InTurn], list[Signal | None]],
    ) -> tuple[list[Signal | None], int]:
        """What the teacher says about each micro-batch, and how many batches of its own that took. A collective call in lockstep.

        Args:
            look: Runs the teacher.
        """
        samples = [sample for batch in batches for sample in batch.samples]
        tokens = [n for batch in batches for n in batch.lengths]
        lengths = {id(sample): n for sample, n in zip(samples, tokens, strict=True)}
        trained = [place for place, n in enumerate(tokens) if n]
        seen = [encoder.teacher_length(samples[i]) for i in trained]
        groups = [[samples[trained[i]] for i in group] for group in self.grouped(seen, encoder.template.padding_free)]
        wanted = ranks.at_most(len(groups)) if self.lockstep else len(groups)
        wanted = -(-max(wanted, 1) // self.multiple) * self.multiple
        filled = groups + (groups[-1:] or [samples[:1]]) * (wanted - len(groups))
        found = look(InTurn(filled, encoder.teacher_batch))
        if found and found[0] is None:  # nothing of the output head is on this rank
            return [None] * len(batches), wanted
        parts = {
            id(sample): part
            for group, signal in zip(groups, found, strict=False)
            for sample, part in zip(group, split(signal, [lengths[id(sample)] for sample in group]), strict=True)
        }
        nothing = split(found[0], [0])[0]
        return [joined([parts.get(id(sample), nothing) for sample in batch.samples]) for batch in batches], wanted
