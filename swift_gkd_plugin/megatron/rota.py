"""Who looks at which micro-batch, where student and teacher have different numbers of data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rota:
    """Which replica of the teacher looks at which micro-batch. All replicas take part in every round, for experts can be spread over them.

    Attributes:
        everything: (owner, number) of each micro-batch; the owner is a data-parallel rank of the student.
        rounds: Micro-batches of each replica, fillers included.
    """

    everything: list[tuple[int, int]]
    rounds: int

    @classmethod
    def make(cls, counts: list[int], replicas: int, multiple: int = 1) -> Rota:
        """
        Args:
            counts: Micro-batches of each owner.
            replicas: Of the teacher.
            multiple: The schedule wants a multiple of this many micro-batches.
        """
        everything = [(owner, number) for owner, count in enumerate(counts) for number in range(count)]
        rounds = -(-len(everything) // replicas)
        return cls(everything, -(-rounds // multiple) * multiple)

    def of(self, replica: int) -> list[tuple[int, int]]:
        """What a replica runs. Consecutive ones: owners and replicas on the same ranks mostly have nothing to send. The last micro-batch
        serves as a filler."""
        first = replica * self.rounds
        return [self.everything[min(place, len(self.everything) - 1)] for place in range(first, first + self.rounds)]

    def answered(self, replica: int, turn: int) -> tuple[int, int] | None:
        """The (owner, number) that gets a replica's states of one round; None for a filler."""
        place = replica * self.rounds + turn
        return self.everything[place] if place < len(self.everything) else None
