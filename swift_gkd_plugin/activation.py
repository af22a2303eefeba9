"""How ``swift rlhf --rlhf_type gkd`` and ``megatron rlhf --rlhf_type gkd`` find the plugin.

ms-swift parses its options before it loads any plugin file, in a process that its launcher starts from a script path. So an installed
``swift_gkd_plugin.pth`` looks at the command line of every starting Python and enters :func:`activate` only where one of those scripts is
on it. From there on nothing is changed until ms-swift imports a module that has a seam (``hf/host.py``, ``megatron/host.py``).

This file imports the standard library only: it runs before torch and ms-swift.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn, Optional

from .arguments import OptionError
from .seams import option_value
from .versions import __version__

SWITCH = 'SWIFT_GKD_PLUGIN'
HOSTS = '>=4.6.0,<4.7'  # versions of ms-swift whose seams were tested; the same as in pyproject.toml

RAY = 'swift.ray.megatron.pipeline'  # its file by another name, as ``python -m`` runs it

Seam = Callable[[ModuleType], Optional[dict[str, Any]]]


class HostError(RuntimeError):
    """The installed ms-swift is not one that the plugin knows."""


def activate() -> None:
    """Take over gkd if this process runs ms-swift's rlhf script with it. Entered from the .pth at the start of Python."""
    index = _script_index(sys.orig_argv)
    if index is None or _switched_off():
        return
    if sys.orig_argv[index] == RAY:
        _enter_by_command(index)
        return
    megatron = '_megatron' in sys.orig_argv[index]
    options = sys.orig_argv[index + 1 :]
    rlhf_type = option_value(options, '--rlhf_type', shortest='--rlh')
    if megatron and _wants_ray(options):
        in_file = _type_in_file(option_value(options, '--config'))
        if 'gkd' in (rlhf_type, in_file):
            _only_a_file(options, in_file)
        rlhf_type = in_file
    wants_help = '-h' in options or '--help' in options
    if rlhf_type == 'gkd' or (rlhf_type is None and wants_help):
        try:
            _print_errors_in_one_line()
            _install(_seams(hf=not megatron, megatron=megatron))
        except Exception as error:
            _give_up(f'{type(error).__name__}: {error}')


def _enter_by_command(index: int) -> None:
    """``python -m swift.ray.megatron.pipeline`` runs that file as ``__main__``, where no seam reaches it: gkd goes in by the command that
    imports it."""
    options = sys.orig_argv[index + 1 :]
    if _type_in_file(option_value(options, '--config')) == 'gkd':
        argv = [*sys.orig_argv[:index], 'swift.cli._megatron.rlhf', '--use_ray', 'true', *options]
        os.execv(sys.executable, [sys.executable, *argv[1:]])


def _give_up(reason: str) -> NoReturn:
    """End the process. Python only prints what a .pth raises and carries on: gkd would run as stock ms-swift unnoticed."""
    print(f'swift-gkd-plugin: {reason} {SWITCH}=0 runs stock ms-swift.', file=sys.stderr, flush=True)
    os._exit(1)


def enter_rank() -> None:
    """Take over gkd in a worker of Ray, whose command line is Ray's. Entered before the worker imports ms-swift."""
    _install(_seams(hf=False, megatron=True))


def register() -> None:
    """See :func:`swift_gkd_plugin.register`."""
    if _switched_off():
        warnings.warn(f'{SWITCH}={os.environ[SWITCH]}: --rlhf_type gkd stays the one of ms-swift.', stacklevel=3)
    else:
        _install(_seams(hf=True, megatron=True))
        _check_host()


def _script_index(argv: list[str]) -> Optional[int]:
    """Where ms-swift's rlhf script stands: behind ``python``, but as well behind a launcher, a debugger or a profiler.

    In the process of such a launcher (torchrun's agent, say) nothing imports ms-swift, so that the seams do nothing there.
    """
    for index, token in enumerate(argv[1:], 1):
        if token in ('swift.cli.rlhf', 'swift.cli._megatron.rlhf') or (token == RAY and argv[index - 1] == '-m'):
            return index
        path = os.path.abspath(token).replace(os.sep, '/')
        if path.endswith(('/swift/cli/rlhf.py', '/swift/cli/_megatron/rlhf.py')):
            return index
    return None


def _switched_off() -> bool:
    return os.environ.get(SWITCH, '').lower() in ('0', 'false', 'no', 'off')


def _wants_ray(options: list[str]) -> bool:
    """As ``swift/cli/_megatron/rlhf.py`` decides it: a bare --use_ray counts as true."""
    if '--use_ray' not in options:
        return False
    return options[options.index('--use_ray') + 1 :][:1] not in (['false'], ['False'], ['FALSE'])


def _type_in_file(path: Optional[str]) -> Optional[str]:
    """The rlhf_type that the file of a Ray run names, YAML or JSON; its reader is not installed for certain, one key needs none."""
    if path is None or not os.path.isfile(path):
        return None
    with open(path, encoding='utf-8', errors='replace') as file:
        found = re.search(r'(?:^|[{,])\s*["\']?rlhf_type["\']?\s*:\s*["\']?(\w+)', file.read(), re.MULTILINE)
    return found and found.group(1)


def _only_a_file(options: list[str], rlhf_type: Optional[str]) -> None:
    """Refuse what ms-swift would not read: of a command line with --use_ray it reads --config and nothing else.

    Args:
        rlhf_type: As the file has it.
    """
    names = [token.partition('=')[0] for token in options if token.startswith('--')]
    known = ('--use_ray', '--config', *(['--rlhf_type'] if rlhf_type == 'gkd' else ()))
    unread = [name for name in names if name not in known]
    if unread or '--config' not in options:
        found = f'{unread[0]} is not read' if unread else 'there is no --config'
        _give_up(f'megatron rlhf --use_ray: {found}; every option, --rlhf_type too, belongs in the YAML file of --config FILE.')


def _seams(*, hf: bool, megatron: bool) -> dict[str, Seam]:
    seams: dict[str, Seam] = {'swift': _check_host}
    if hf:
        from .hf import host

        seams.update(host.SEAMS)
    if megatron:
        from .megatron import host

        seams.update(host.SEAMS)
        seams[host.RAY] = functools.partial(host.take_over_ray, enter=enter_rank)
    return seams


def _check_host(_: ModuleType | None = None) -> None:
    from packaging.specifiers import SpecifierSet
    from swift.version import __version__ as host

    if not SpecifierSet(HOSTS).contains(host, prereleases=True):
        raise HostError(
            f'ms-swift {host}: swift-gkd-plugin {__version__} supports ms-swift{HOSTS}. Install one of these, or run '
            f'without the plugin: {SWITCH}=0 runs stock ms-swift.'
        )


def _print_errors_in_one_line() -> None:
    """On a command line a wrong option needs its message, not forty lines of the calls that led there."""
    usual = sys.excepthook

    def excepthook(kind: type, error: BaseException, traceback: Any) -> None:
        if issubclass(kind, (OptionError, HostError)):
            print(f'swift-gkd-plugin: {error}', file=sys.stderr, flush=True)
        else:
            usual(kind, error, traceback)

    sys.excepthook = excepthook


_installed: set[str] = set()


def _install(seams: dict[str, Seam]) -> None:
    """Apply each seam to its module: now if the module is there, else right after its import. Every seam is applied once."""
    waiting = {}
    for name, seam in seams.items():
        if name in _installed:
            continue
        _installed.add(name)
        if name in sys.modules:
            _apply(name, seam, late=True)
        else:
            waiting[name] = seam
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


def _apply(name: str, seam: Seam, *, late: bool) -> None:
    """A seam changes a module in place and returns the names in it that get a new value.

    A late one finds that others have imported the old values: they are replaced wherever they are held under a module's name.
    """
    module = sys.modules[name]
    for attribute, new in (seam(module) or {}).items():
        old = getattr(module, attribute)
        setattr(module, attribute, new)
        for holder in list(sys.modules.values()) if late else ():
            for key, value in list(getattr(holder, '__dict__', {}).items()):
                if value is old:
                    setattr(holder, key, new)


class _AfterImport:
    """A meta-path finder that lets the usual loader execute a module and then applies the module's seam, before anyone reads it."""

    def __init__(self, seams: dict[str, Seam]) -> None:
        self.seams = seams
        self.looking_for: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.seams or name in self.looking_for:
            return None
        self.looking_for.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking_for.remove(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _apply(name, self.seams[name], late=False)
                del self.seams[name]

            spec.loader.exec_module = exec_module
        return spec
