"""What a rank holds, by part, in each phase of a step: the peak is that of the fullest phase, not the sum of all parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

GIB = 2**30
GENERATION, TEACHER, STUDENT, UPDATE = PHASES = ('generation', 'teacher', 'student', 'update')


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        name: As it is printed.
        bytes: On one rank.
        phases: In which it is there.
        exact: Whether it follows from shapes and dtypes alone; an estimate depends on what the rows and the allocator do.
    """

    name: str
    bytes: int
    phases: Collection[str] = PHASES
    exact: bool = True


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        parts: Of one rank, the fullest one.
        phases: That a step has.
        not_counted: What is there besides, in words.
    """

    parts: tuple[Part, ...]
    phases: tuple[str, ...] = PHASES
    not_counted: tuple[str, ...] = ()

    def held(self, phase: str, exact_only: bool = False) -> int:
        """Bytes in a phase, of all parts or of the exact ones."""
        return sum(part.bytes for part in self.parts if phase in part.phases and (part.exact or not exact_only))

    def peak(self, exact_only: bool = False) -> int:
        return max(self.held(phase, exact_only) for phase in self.phases)

    def fullest(self, exact_only: bool = False) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: self.held(phase, exact_only))

    def largest(self, exact_only: bool = False, count: int = 3) -> str:
        """The largest parts of the peak, in words."""
        phase = self.fullest(exact_only)
        there = [part for part in self.parts if phase in part.phases and part.bytes and (part.exact or not exact_only)]
        there.sort(key=lambda part: -part.bytes)
        return ', '.join(f'{part.name} {gib(part.bytes)}' for part in there[:count])

    def __str__(self) -> str:
        """A line for each part, a column for each phase."""
        name, size = _unit(self.peak())

        def row(title: str, values: list[int], exact: bool = True) -> str:
            cells = [f'{"" if exact else "~"}{value / size:.{1 if value >= 10 * size else 2}f}' if value else '' for value in values]
            return (f'{title:<34}' + ''.join(f'{cell:>12}' for cell in cells)).rstrip()

        lines = [f'{f"{name} (~: estimated)":<34}' + ''.join(f'{phase:>12}' for phase in self.phases)]
        for part in self.parts:
            there = [part.bytes if phase in part.phases else 0 for phase in self.phases]
            if any(there):
                lines.append(row(part.name, there, part.exact))
        lines.append(row('sum', [self.held(phase) for phase in self.phases], all(part.exact for part in self.parts)))
        lines.append(row('of it exact', [self.held(phase, exact_only=True) for phase in self.phases]))
        if self.not_counted:
            lines.append(f'Not counted: {"; ".join(self.not_counted)}.')
        return '\n'.join(lines)


def but(phases: Collection[str]) -> tuple[str, ...]:
    """All phases, without these."""
    return tuple(phase for phase in PHASES if phase not in phases)


def gib(size: int) -> str:
    """Bytes as a number with its unit."""
    name, unit = _unit(size)
    return f'{size / unit:.1f} {name}'


def _unit(size: int) -> tuple[str, int]:
    return next(((name, unit) for name, unit in (('GiB', GIB), ('MiB', 2**20)) if size >= unit), ('KiB', 2**10))
