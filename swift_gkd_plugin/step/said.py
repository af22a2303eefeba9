"""What is said of rows: which they are, so that a user finds them, and not more often than anybody reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift.utils import get_logger

from ..teachers.server import MEDIA

logger = get_logger()

NAMED = 5  # rows of which each has a line; of more there are counts
LONGEST_TEXT, LONGEST_REASON = 40, 300


class Few:
    """Warnings of one kind: the first few as they are, then how many there are, each time their number has doubled.

    Args:
        what: There are, for the counts.
    """

    def __init__(self, what: str):
        self.what, self.count = what, 0
        self._next = 2 * NAMED

    def say(self, line: str) -> None:
        self.count += 1
        if self.count <= NAMED:
            logger.warning(line)
        elif self.count == self._next:
            logger.warning(f'{self.count} {self.what}; the first {NAMED} are named above.')
            self._next *= 2


def names_of(samples: Sequence[Any]) -> str:
    """The first few by name."""
    more = len(samples) - 2 * NAMED
    return ', '.join(map(str, samples[: 2 * NAMED])) + (f' and {more} more' if more > 0 else '')


def in_one_line(error: Exception) -> str:
    return _cut(f'{error}', LONGEST_REASON) or type(error).__name__


def how_to_find(content: dict[str, Any]) -> str:
    """The beginning of a row's last question, and its media by their names: the number of a row is that after ms-swift has shuffled."""
    questions = [message.get('content') for message in content.get('messages') or () if message.get('role') == 'user']
    text = _text(questions[-1]) if questions else ''
    named = [_name(one) for kind in MEDIA for one in _listed(content.get(kind))]
    media = ', '.join(named[:NAMED]) + (f' and {len(named) - NAMED} more' if len(named) > NAMED else '')
    return ' with '.join(part for part in (f'"{_cut(text, LONGEST_TEXT)}"', media) if part)


def _text(content: Any) -> str:
    """Of a message, which may be a list of parts."""
    if isinstance(content, list):
        return ' '.join(str(part.get('text', '')) for part in content if isinstance(part, dict))
    return str(content or '')


def _listed(media: Any) -> list[Any]:
    return media if isinstance(media, list) else [] if media is None else [media]


def _name(medium: Any) -> str:
    """A path or an address; the kind of what has none."""
    if isinstance(medium, dict):
        medium = medium.get('path') or medium.get('url') or medium
    if isinstance(medium, list):
        return ', '.join(map(_name, medium[:NAMED]))  # frames of a video
    return _cut(medium, LONGEST_REASON) if isinstance(medium, str) else type(medium).__name__


def _cut(text: str, length: int) -> str:
    text = ' '.join(text.split())
    return text if len(text) <= length else f'{text[:length]}…'
