"""Tools with which the two back ends change ms-swift: new option fields, replaced methods, old spellings, options by --model_kwargs.

What is changed, and why, stands in ``hf/host.py`` and ``megatron/host.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from .arguments import OPTION_NAMES, GKDOptions, OptionError

Field = tuple[str, Any, Any]


def option_fields() -> list[Field]:
    """The plugin's options as ``make_dataclass`` wants them, with their Literal and Optional types and help texts."""
    return fields_of(GKDOptions, OPTION_NAMES)


def fields_of(cls: type, names: Sequence[str]) -> list[Field]:
    """Some fields of a dataclass, to be given to another one."""
    types = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    return [(name, types[name], _like(known[name])) for name in names]


def _like(f: dataclasses.Field) -> Any:
    metadata = dict(f.metadata)
    if 'help' in metadata:
        metadata['help'] = metadata['help'].replace('%', '%%')  # argparse formats it
    return dataclasses.field(default=f.default, default_factory=f.default_factory, metadata=metadata)


def extended(cls: type, fields: Sequence[Field]) -> type:
    """A dataclass like ``cls`` with more fields.

    It keeps the name and the module of ``cls``: what is pickled in a checkpoint (training_args.bin) then loads without the plugin.
    """
    new = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace={'__doc__': cls.__doc__})
    new.__module__, new.__qualname__ = cls.__module__, cls.__qualname__
    return new


def for_gkd(cls: type, name: str) -> Callable[[Callable], Callable]:
    """Decorator: the function replaces ``cls.name`` in gkd runs and gets the stock method, bound, as its second argument.

    Other values of rlhf_type never reach the function. Methods are replaced in place, not in a subclass, because with
    --external_plugins the object at work exists already when the plugin is imported.
    """
    stock = getattr(cls, name)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(stock)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.rlhf_type != 'gkd':
                return stock(self, *args, **kwargs)
            return function(self, functools.partial(stock, self), *args, **kwargs)

        setattr(cls, name, method)
        return function

    return decorate


def take_options(args: Any) -> None:
    """Give ``args`` every option of the plugin as an attribute: from its own field, or from --model_kwargs.

    --model_kwargs is the way for --external_plugins, which is loaded when the command line has been parsed.

    Raises:
        OptionError: An unknown name or a wrong type in --model_kwargs, or an option that is given in both places.
    """
    from swift.utils import json_parse_to_dict

    given = {k: v for k, v in (json_parse_to_dict(args.model_kwargs) or {}).items() if k.lower().startswith('gkd_')}
    unknown = [k for k in given if k not in OPTION_NAMES]
    if unknown:
        raise OptionError(f'--model_kwargs {unknown[0]}: not an option of the plugin; there are {", ".join(OPTION_NAMES)}.')
    types = typing.get_type_hints(GKDOptions)
    for f in dataclasses.fields(GKDOptions):
        value = getattr(args, f.name, f.default)
        if f.name in given:
            wanted = _typed(f.name, types[f.name], given[f.name])
            if value not in (f.default, wanted):
                raise OptionError(f'--{f.name} {value} and --model_kwargs {f.name} {wanted}: give one of them.')
            value = wanted
        setattr(args, f.name, value)


@contextmanager
def allowed(args: Any) -> Iterator[None]:
    """The arguments without what ms-swift's checks refuse in gkd runs: seq_kd as not implemented, a teacher server without k."""
    given = args.seq_kd, args.gkd_logits_topk
    args.seq_kd = False
    if args.gkd_signal == 'sampled' and args.teacher_model_server is not None:
        args.gkd_logits_topk = 1
    try:
        yield
    finally:
        args.seq_kd, args.gkd_logits_topk = given


def check_first(cls: type, check: Callable[[Any], None]) -> None:
    """Have a gkd run's options checked before ms-swift looks at them.

    Args:
        cls: An argument class of ms-swift.
        check: Takes the plugin's options into the arguments and checks all of them.
    """

    @for_gkd(cls, '__post_init__')
    def before_anything_else(self: Any, stock: Callable[[], None]) -> None:
        # Stock connects to a vLLM server or sets up torch.distributed before it has checked a single option.
        check(self)
        stock()

    @for_gkd(cls, '_init_model_kwargs')
    def once_plugins_are_loaded(self: Any, stock: Callable[[], None]) -> None:
        # The first method that runs after --external_plugins: if we came that way, before_anything_else did not run.
        stock()
        check(self)
        forget_external_plugin(self)


def recognise_base(cls: type, recognise: Callable[[Any, Optional[str]], None]) -> None:
    """Have a gkd run's teacher looked at by its weights, where it may be the student's base.

    Args:
        cls: An argument class of ms-swift.
        recognise: Is given the arguments and ``--teacher_model`` as it was given; sets what ms-swift has set, anew.
    """

    @for_gkd(cls, '_check_teacher')
    def by_its_weights(self: Any, stock: Callable[[], None]) -> None:
        # Stock compares two strings, ignores the revisions and knows LoRA only.
        teacher = self.teacher_model
        stock()
        recognise(self, teacher)


def become_ours(cls: type, command_line: Callable[[Any, type], Any], ours: Callable[[], type]) -> None:
    """Have a pipeline of ms-swift read another command line than it is given, and become the plugin's in gkd runs.

    Args:
        cls: The pipeline's class.
        command_line: Turns what the pipeline is to parse, and its class of arguments, into what it parses.
        ours: Loads the class that a gkd run's pipeline becomes.
    """
    parse, set_seed = cls._parse_args, cls._set_seed

    def _parse_args(self: Any, args: Any = None) -> Any:
        return parse(self, command_line(args, self.args_class))

    def _set_seed(self: Any) -> None:
        # The first method that the constructor calls once the options are known, so that it is reached with --external_plugins too:
        # only now can be said whether this object is to be ours.
        if self.args.rlhf_type == 'gkd' and type(self) is cls:
            self.__class__ = ours()
        set_seed(self)

    cls._parse_args, cls._set_seed = _parse_args, _set_seed


def forget_external_plugin(args: Any) -> None:
    """Take our file out of --external_plugins once it is loaded.

    ``swift infer`` loads what args.json of a checkpoint names, and would fail where the plugin is not installed.
    """
    ours = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'external.py')
    for name in ('external_plugins', 'custom_register_path'):
        setattr(args, name, [path for path in getattr(args, name) if os.path.realpath(os.path.expanduser(path)) != ours])


JSON_NAMES = {bool: 'true or false', int: 'integer', float: 'number', str: 'string'}


def _typed(name: str, kind: Any, value: Any) -> Any:
    """A value from JSON as the type of its option: an integer serves as a number, nothing else is converted."""
    choices = typing.get_args(kind)
    if type(None) in choices:
        if value is None:
            return None
        kind = choices[0]
    if typing.get_origin(kind) is typing.Literal:
        kind = str
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise OptionError(f'--model_kwargs {name} {value!r}: must be a JSON {JSON_NAMES[kind]}.')
    return value


def option_value(options: list[str], name: str, shortest: Optional[str] = None) -> Optional[str]:
    """The value that argparse will see: the last one, as ``--a_b x``, ``--a_b=x`` or ``--a-b x``.

    argparse takes a beginning of a name for the name where no other option begins so: ``shortest`` is the shortest one.
    """
    value = None
    for index, token in enumerate(options):
        option, equals, attached = token.partition('=')
        if len(option) >= len(shortest or name) and name.startswith('--' + option[2:].replace('-', '_')):
            value = attached if equals else ''.join(options[index + 1 : index + 2])
    return value


@dataclasses.dataclass(frozen=True)
class Renamed:
    """An option of an earlier ms-swift: today's spelling, values that were renamed too, or why it can go."""

    today: Optional[str] = None
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: str = ''


def modernise(argv: Sequence[str], renamed: dict[str, Renamed]) -> tuple[list[str], list[str]]:
    """Rewrite options that ms-swift has renamed or dropped since 3.x.

    Returns:
        The new command line, and one line for the user per option that was rewritten.
    """
    result, notices = [], []
    entry = None
    for token in argv:
        if token.startswith('--') or token == '-h':
            name, equals, value = token.partition('=')
            entry = renamed.get('--' + name[2:].replace('-', '_'))
            if entry is None:
                result.append(token)
            elif entry.today is None:
                notices.append(f"{name} is no option of today's ms-swift and is left out: {entry.dropped}")
            else:
                notices.append(f"{name} is spelled {entry.today} in today's ms-swift; it is read as that.")
                result.append(entry.today + equals + entry.values.get(value, value))
        elif entry is None:
            result.append(token)
        elif entry.today is not None:
            result.append(entry.values.get(token, token))
    return result, notices


def modern_command_line(args: Any, renamed: dict[str, Renamed], args_class: type) -> Any:
    """The command line of a pipeline with today's spellings, if it is one and asks for gkd; anything else as it is."""
    if isinstance(args, args_class):
        return args
    argv = sys.argv[1:] if args is None else args
    if option_value(argv, '--rlhf_type', shortest='--rlh') != 'gkd':
        return args
    from swift.utils import get_logger

    argv, notices = modernise(argv, renamed)
    for notice in notices:
        get_logger().warning(notice)
    return argv
