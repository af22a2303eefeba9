"""What the doctor finds, and how it is printed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..arguments import OptionError
from ..versions import __version__

OK, NOTE, WARNING, ERROR = LEVELS = ('ok', 'note', 'warning', 'error')
NAMED = 'Change what the line names.'
WIDTH = 118  # of the lines that are printed


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        section: Under which it is printed.
        name: For scripts; it stays the same from version to version.
        level: One of :data:`LEVELS`; an error is what a run ends with, or should.
        what: In a line.
        do: In a line; empty if there is nothing to do.
        more: Lines below, a table say.
        data: The same for scripts.
    """

    section: str
    name: str
    level: str
    what: str
    do: str = ''
    more: str = ''
    data: dict[str, Any] = field(default_factory=dict)


class Findings(list[Finding]):
    """In the order in which they were found."""

    section = ''

    def ok(self, name: str, what: str, **rest: Any) -> None:
        self.append(Finding(self.section, name, OK, what, **rest))

    def note(self, name: str, what: str, do: str = '', **rest: Any) -> None:
        self.append(Finding(self.section, name, NOTE, what, do, **rest))

    def warning(self, name: str, what: str, do: str, **rest: Any) -> None:
        self.append(Finding(self.section, name, WARNING, what, do, **rest))

    def error(self, name: str, what: str, do: str, **rest: Any) -> None:
        self.append(Finding(self.section, name, ERROR, what, do, **rest))

    @property
    def status(self) -> int:
        """The exit status: 1 with an error."""
        return int(any(finding.level == ERROR for finding in self))

    @contextmanager
    def refusals(self, name: str) -> Iterator[None]:
        """What ends a run inside is an error that is found: the plugin's own refusals in their words, others' with their kind."""
        try:
            yield
        except OptionError as error:
            self.error(name, *_what_and_do(str(error)))
        except Exception as error:
            what = next(iter(str(error).splitlines()), '')
            self.error(
                name, f'The run would end with {type(error).__name__}: {what}', 'It comes from below the plugin; correct what it names.'
            )

    def told(self, name: str, line: str) -> None:
        """A warning of a run, which says what to do in the same line."""
        if ' is not used as such: ' in line:
            self.warning(name, line, 'Leave it out, or change what it depends on.')
        else:
            self.warning(name, *_what_and_do(line))

    def as_json(self) -> str:
        whole = {'version': __version__, 'status': self.status, 'findings': [asdict(finding) for finding in self]}
        return json.dumps(whole, ensure_ascii=False, indent=1)

    def __str__(self) -> str:
        lines, section = [], None
        for finding in self:
            if finding.section != section:
                section = finding.section
                lines += ['', section] if lines else [section]
            lines += _wrapped(f'  {finding.level:<9}', finding.what)
            lines += _wrapped(' ' * 11 + '→ ', finding.do) if finding.do else []
            lines += [' ' * 11 + line for line in finding.more.splitlines()]
        counts = ((sum(f.level == level for f in self), level) for level in (ERROR, WARNING, NOTE))
        said = [f'{count} {level}{"s" if count > 1 else ""}' for count, level in counts if count]
        return '\n'.join([*lines, '', ', '.join(said) or 'Nothing to say.'])


def _wrapped(before: str, text: str) -> list[str]:
    rest = ' ' * len(before)
    return textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def _what_and_do(line: str) -> tuple[str, str]:
    """The plugin's own lines say what to do behind their last semicolon."""
    what, semicolon, do = line.rpartition('; ')
    return (f'{what}.', do[0].upper() + do[1:]) if semicolon else (line, NAMED)
