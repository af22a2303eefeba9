"""The rooms of docs/architecture: who may know whom, and that the two back ends do not tell the same twice."""

from __future__ import annotations

import ast
import graphlib
import io
import itertools
import keyword
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'swift_gkd_plugin'

# From low to high. A room knows itself and those of lower storeys, and none beside it.
STOREYS = (
    ('arguments', 'divergence', 'serving', 'sources', 'user_functions', 'versions', 'world'),
    ('feedback',),
    ('metrics', 'responses', 'rewards', 'seams', 'unused'),
    ('teachers',),
    ('checks',),
    ('step',),
    ('memory',),
    ('hf', 'megatron'),
    ('activation',),  # the entrance: it loads the seams of both back ends
    ('',),  # `import swift_gkd_plugin`
    ('external', 'doctor'),
    ('command',),  # `swift-gkd`
)
STOREY = {room: number for number, storey in enumerate(STOREYS) for room in storey}

# Loaded before torch and ms-swift. Inside a function they may ask ms-swift, which is there by the time of the call.
STANDARD_LIBRARY_ONLY = (
    *('', 'activation', 'arguments', 'external', 'feedback', 'hf.host', 'megatron.host', 'seams', 'sources', 'unused', 'user_functions'),
    'versions',
)

# What a step must not know; the trainers do.
BACK_ENDS = (
    'accelerate',
    'deepspeed',
    'mcore_bridge',
    'megatron',
    'swift.megatron',
    'swift.trainers',
    'transformers.Trainer',
    'transformers.trainer',
)

SAME_LINES = 6  # so many lines of one shape in a row are told twice


def module_name(file: Path) -> str:
    """Inside the package; '' for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob('*.py'))}
each_module = pytest.mark.parametrize('module', MODULES, ids=lambda name: name or 'package')


def room(module: str) -> str:
    return module.partition('.')[0]


@dataclass(frozen=True)
class Import:
    """One imported name.

    Attributes:
        name: Of the module; for ``from torch import nn``, ``torch.nn``. Modules of the package go by their name inside it.
        ours: Whether it is one of the package.
        at_start: Whether it is imported with the module, not in a function of it.
    """

    name: str
    ours: bool
    at_start: bool
    line: int


def imports(module: str) -> Iterator[Import]:
    file = MODULES[module]
    here = module.split('.') if module else []
    package = here if file.name == '__init__.py' else here[:-1]

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield one(alias.name.split('.'), at_start, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or '').split('.') if node.module else []
            if node.level:
                base = [PACKAGE.name, *package[: len(package) - node.level + 1], *base]
            for alias in node.names:
                yield one([*base, alias.name], at_start, node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_start and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))

    def one(parts: list[str], at_start: bool, line: int) -> Import:
        if parts[0] != PACKAGE.name:
            return Import('.'.join(parts), False, at_start, line)
        inside = parts[1:]
        while '.'.join(inside) not in MODULES:  # the last part is a name in a module
            inside = inside[:-1]
        return Import('.'.join(inside), True, at_start, line)

    return visit(ast.parse(file.read_text()), True)


def test_every_module_has_a_room():
    assert {room(module) for module in MODULES} == set(STOREY)


@each_module
def test_a_room_knows_only_lower_ones(module):
    mine = room(module)
    wrong = [
        f'{MODULES[module]}:{found.line} imports {found.name or "the package"}'
        for found in imports(module)
        if found.ours and room(found.name) != mine and STOREY[room(found.name)] >= STOREY[mine]
    ]
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('module', STANDARD_LIBRARY_ONLY, ids=lambda name: name or 'package')
def test_what_starts_first_needs_the_standard_library_only(module):
    loaded, waiting, wrong = set(), [module], []
    while waiting:
        name = waiting.pop()
        if name in loaded:
            continue
        loaded.add(name)
        waiting.append(name.rpartition('.')[0])  # Python loads a package before what is in it
        for found in imports(name):
            if found.ours and found.at_start:
                waiting.append(found.name)
            elif found.at_start and room(found.name) not in sys.stdlib_module_names:
                wrong.append(f'{MODULES[name]}:{found.line} imports {found.name}')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('module', [name for name in MODULES if room(name) == 'step'])
def test_a_step_knows_no_back_end(module):
    wrong = [
        f'{MODULES[module]}:{found.line} imports {found.name}'
        for found in imports(module)
        if not found.ours and any(f'{found.name}.'.startswith(f'{name}.') for name in BACK_ENDS)
    ]
    assert not wrong, '\n'.join(wrong)


def test_no_circle():
    """Not even one that is cut by an import inside a function: such modules are one module in two files."""
    graph = {module: {found.name for found in imports(module) if found.ours} - {module} for module in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail('These import each other: ' + ' <- '.join(name or 'the package' for name in error.args[1]))


# --- Told twice ---


@dataclass(frozen=True)
class Line:
    """A line of code without its names and values."""

    number: int
    shape: tuple[str, ...]
    is_import: bool

    @property
    def says_little(self) -> bool:
        return len(self.shape) < 3 or set(self.shape) <= set('()[]{}')


def shapes(source: str) -> list[Line]:
    """The lines of code, without comments, docstrings and blank lines."""
    lines = []
    for statement in statements(source):
        if all(token.type == tokenize.STRING for token in statement):
            continue  # a docstring
        is_import = statement[0].string in ('import', 'from')
        for number, tokens in itertools.groupby(statement, lambda token: token.start[0]):
            lines.append(Line(number, tuple(map(symbol, tokens)), is_import))
    return lines


def statements(source: str) -> Iterator[list[tokenize.TokenInfo]]:
    invisible = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    statement, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == 'FSTRING_START':  # from Python 3.12 an f-string is many tokens
            depth += 1
            if depth == 1:
                statement.append(token._replace(type=tokenize.STRING))
        elif kind == 'FSTRING_END':
            depth -= 1
        elif token.type == tokenize.NEWLINE:
            yield statement
            statement = []
        elif not depth and token.type not in invisible:
            statement.append(token)


def symbol(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
        return 'name'
    return 'value' if token.type in (tokenize.STRING, tokenize.NUMBER) else token.string


def runs(one: list[Line], other: list[Line]) -> Iterator[tuple[list[Line], list[Line]]]:
    """The longest runs of lines that have the same shapes in both."""
    places = defaultdict(list)
    for j, line in enumerate(other):
        places[line.shape].append(j)
    for i, line in enumerate(one):
        for j in places[line.shape]:
            if i and j and one[i - 1].shape == other[j - 1].shape:
                continue  # inside a run
            length = 0
            for a, b in zip(one[i:], other[j:], strict=False):
                if a.shape != b.shape:
                    break
                length += 1
            yield one[i : i + length], other[j : j + length]


def told_twice(one: str, other: str) -> list[tuple[range, range]]:
    """Where two sources have runs of the same shape, as numbers of lines."""
    return [
        tuple(range(run[0].number, run[-1].number + 1) for run in both)
        for both in runs(shapes(one), shapes(other))
        if len(both[0]) >= SAME_LINES and not all(line.is_import for line in both[0]) and not all(line.says_little for line in both[0])
    ]


def test_the_back_ends_do_not_tell_the_same_twice():
    found = []
    for one, other in itertools.product((PACKAGE / 'hf').glob('*.py'), (PACKAGE / 'megatron').glob('*.py')):
        for here, there in told_twice(one.read_text(), other.read_text()):
            found.append(f'{one}:{here[0]}-{here[-1]} and {other}:{there[0]}-{there[-1]}')
    assert not found, 'The same lines but for names and values; they belong into a room that both back ends know:\n' + '\n'.join(found)


CODE = '''
def answer(rows, limit):
    """What it is."""
    found = []
    for row in rows:  # every one
        if row.length > limit:
            continue

        found.append(f'{row.number}: {row.text}')
    return found
'''


@pytest.mark.parametrize(
    ('change', 'twice'),
    [
        (str, [(2, 10)]),
        (
            lambda code: code.replace('row', 'x').replace('What it is.', 'Something\n    else.').replace(" f'{x.number}: {x.text}'", '7'),
            [(2, 11)],
        ),
        (lambda code: code.replace('continue', 'break'), []),
        (lambda code: code.replace('    found = []\n', ''), []),
    ],
    ids=['copied', 'renamed', 'another statement in the middle', 'a statement less'],
)
def test_told_twice(change, twice):
    other = change(CODE)
    assert [(there[0], there[-1]) for _, there in told_twice(CODE, other)] == twice


def test_imports_and_brackets_are_no_story():
    several = ''.join(f'from .a import {name}\n' for name in 'abcdefg')
    closing = 'x = f(\n' + 'a,\n' * 7 + ')\n'
    assert not told_twice(several, several)
    assert not told_twice(closing, closing.replace('x = f(', 'return g('))
