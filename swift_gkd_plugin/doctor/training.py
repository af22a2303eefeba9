"""A training command, read as ms-swift reads it, up to the arguments of a run that does not begin."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..activation import register
from ..arguments import OPTION_NAMES
from ..seams import option_value
from .findings import Findings

MADE_UP_PORT = '29500'  # nobody listens: the ranks of a fake process group do not talk


class UsageError(ValueError):
    """What is appended is no training command."""


@dataclass
class Command:
    """
    Attributes:
        megatron: Whether it is ``megatron rlhf``.
        options: Behind that.
        variables: Of the environment, set in front of it.
    """

    megatron: bool
    options: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, words: list[str]) -> Command:
        """
        Args:
            words: ``NPROC_PER_NODE=4 swift rlhf --…``, or only the options or the YAML file of ``swift rlhf``.

        Raises:
            UsageError: Another command.
        """
        variables, rest = {}, list(words)
        while rest and not rest[0].startswith('-') and rest[0].partition('=')[0].isidentifier() and '=' in rest[0]:
            name, _, value = rest.pop(0).partition('=')
            variables[name] = value
        if rest and (rest[0].startswith('--') or rest[0].endswith(('.yaml', '.yml', '.json'))):
            return cls(False, rest, variables)
        program = os.path.basename(rest[0]) if rest else ''
        if program not in ('swift', 'megatron') or rest[1:2] != ['rlhf']:
            raise UsageError(f'`{" ".join(rest[:2])}` is no training command; append `swift rlhf …`, `megatron rlhf …` or options alone.')
        if '--use_ray' in rest:
            raise UsageError('`megatron rlhf --use_ray` reads a file; append what is in it as options of `megatron rlhf`, without Ray.')
        return cls(program == 'megatron', rest[2:], variables)

    @property
    def name(self) -> str:
        return 'megatron rlhf' if self.megatron else 'swift rlhf'

    def needs(self) -> set[str]:
        """Of what is optional in the environment; see ``environment.py``."""
        given = {name: option_value(self.options, name) for name in ('--use_vllm', '--gkd_teacher_engine', '--deepspeed', '--attn_impl')}
        needed = {'megatron-core', 'mcore-bridge', 'transformer-engine'} if self.megatron else set()
        if str(given['--use_vllm']).lower() == 'true' or given['--gkd_teacher_engine'] == 'vllm':
            needed.add('vllm')
        if given['--deepspeed'] is not None:
            needed.add('deepspeed')
        if str(given['--attn_impl']) in ('flash_attn', 'flash_attention_2'):
            needed.add('flash-attn')
        return needed

    def enter(self) -> int:
        """Take over its variables, and those that torchrun would set on the first rank. Before torch is imported.

        Returns:
            The number of ranks.

        Raises:
            UsageError: A number of ranks that is none.
        """
        os.environ.update(self.variables)
        counts = {name: os.environ.get(name) for name in ('NPROC_PER_NODE', 'NNODES')}
        try:
            here, nodes = (int(count or 1) for count in counts.values())
        except ValueError:
            raise UsageError(f'NPROC_PER_NODE={counts["NPROC_PER_NODE"]}, NNODES={counts["NNODES"]}: give numbers.') from None
        if any(counts.values()) or self.megatron:
            ranks = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': here * nodes, 'LOCAL_WORLD_SIZE': here}
            os.environ.update({name: str(number) for name, number in ranks.items()}, MASTER_ADDR='127.0.0.1', MASTER_PORT=MADE_UP_PORT)
        return here * nodes


@contextmanager
def arguments(command: Command, ranks: int, found: Findings) -> Iterator[Any | None]:
    """ms-swift's arguments, checked, as on the first rank; None if the command is refused.

    They are valid inside only: what the run would write goes into a directory that is removed afterwards, and nothing is connected.
    """
    with tempfile.TemporaryDirectory(prefix='swift-gkd-doctor-') as scratch:
        yield _arguments(command, ranks, scratch, found)


def _arguments(command: Command, ranks: int, scratch: str, found: Findings) -> Any | None:
    found.section = 'command'
    args = None
    with found.refusals('options'):
        options = _with_file(command.options)
        rlhf_type = option_value(options, '--rlhf_type', shortest='--rlh')
        if rlhf_type != 'gkd':
            what = f'--rlhf_type {rlhf_type}: the plugin trains gkd only.' if rlhf_type else 'There is no --rlhf_type.'
            found.error('rlhf_type', what, 'Write --rlhf_type gkd.')
            return None
        register()
        cls, command_line = _megatron_parser() if command.megatron else _transformers_parser()
        with warnings_of(found, 'spelling'):
            options = command_line(options, cls)
        if not known(cls, options, command.name, found):
            return None
        if ranks > 1 or command.megatron:
            _pretend(ranks)
        _connects_to_nobody(cls, found)
        instead = ['--output_dir', scratch, '--add_version', 'false', *([] if command.megatron else ['--report_to', 'none'])]
        with warnings_of(found, 'options'):
            args = _parsed(cls, [*options, *instead])
    return args


def _with_file(options: list[str]) -> list[str]:
    """``swift rlhf config.yaml`` as options, with the variables of the file set."""
    from swift.cli.main import parse_yaml_args

    options = list(options)
    parse_yaml_args(options)
    return options


def _transformers_parser() -> tuple[type, Callable[[list[str], type], list[str]]]:
    from swift.pipelines.train.rlhf import SwiftRLHF

    from ..hf.host import command_line

    return SwiftRLHF.args_class, command_line


def _megatron_parser() -> tuple[type, Callable[[list[str], type], list[str]]]:
    os.environ.setdefault('CUDA_DEVICE_MAX_CONNECTIONS', '1')  # as in ms-swift's script
    from swift.megatron.arguments import megatron_args
    from swift.megatron.pipelines.train.rlhf import MegatronRLHF

    from ..megatron.host import command_line

    def no_groups(args: Any) -> None:
        # megatron-core's process groups need all ranks. What counts for the checks is how many there are.
        args.world_size = int(os.environ['WORLD_SIZE'])

    megatron_args.initialize_megatron = no_groups
    return MegatronRLHF.args_class, command_line


def _parsed(cls: type, options: list[str]) -> Any:
    from swift.utils import parse_args

    return parse_args(cls, options)[0]


def known(cls: type, options: list[str], name: str, found: Findings) -> bool:
    """Whether all options exist and have values of their types; what is not so is found.

    Args:
        name: Of the command, for the message.
    """
    from swift.utils.utils import _patch_get_type_hints
    from transformers import HfArgumentParser

    class Refused(Exception):
        pass

    def refuse(message: str) -> NoReturn:
        raise Refused(message)

    with _patch_get_type_hints():  # as ms-swift makes its parser: transformers stumbles over the order of some unions
        parser: argparse.ArgumentParser = HfArgumentParser([cls])
    parser.error = refuse
    try:
        _, rest = parser.parse_known_args(options)
    except Refused as error:
        found.error('value', f'{name}: {error}', f'Give a value of that kind; see `{name} --help`.')
        return False
    spellings = [s for s in parser._option_string_actions if s.startswith('--')]
    unknown = [token.partition('=')[0] for token in rest if token.startswith('-') and not _is_number(token)]
    for option in unknown:
        near = difflib.get_close_matches(option.replace('-', '_').replace('__', '--', 1), spellings, n=1)
        # A name of ours before another that is as near: nobody misspells gkd_ into something of the host's.
        ours = difflib.get_close_matches(option, [f'--{n}' for n in OPTION_NAMES], n=1) if option.startswith('--gkd') else []
        best = (ours or near)[:1]
        found.error('unknown_option', f'{option} is no option of `{name}`.', f'Write {best[0]}.' if best else 'Leave it out.')
    if rest and not unknown:
        found.error('unknown_option', f'`{" ".join(rest)}` belongs to no option.', 'Quote values with spaces, or leave it out.')
    return not rest


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True


def _pretend(ranks: int) -> None:
    """A process group of so many ranks, of which there is this one. What it exchanges has no meaning; how many there are has."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group('fake', rank=0, world_size=ranks, store=FakeStore())


def _connects_to_nobody(cls: type, found: Findings) -> None:
    """ms-swift joins a rollout server's process group while it reads its options. Here the server is asked once whether it is there."""
    if not hasattr(cls, '_init_external_vllm'):
        return

    def ask(args: Any) -> None:
        import requests

        urls = args.vllm_server_base_url or [
            f'http://{host}:{port}' for host, port in zip(args.vllm_server_host or [], args.vllm_server_port or [], strict=False)
        ]
        for url in [urls] if isinstance(urls, str) else urls:
            try:
                answer = requests.get(f'{url.rstrip("/")}/health/', timeout=5)
                problem = None if answer.ok else f'it answers {answer.status_code}'
            except requests.RequestException as error:
                problem = type(error).__name__
            if problem is None:
                found.ok('rollout_server', f'The rollout server {url} answers.')
            else:
                do = 'Start `swift rollout`, or correct the address.'
                found.error('rollout_server', f'The rollout server {url} does not answer: {problem}.', do)

    cls._init_external_vllm = ask


@contextmanager
def warnings_of(found: Findings, name: str, besides: tuple[str, ...] = ()) -> Iterator[None]:
    """What the plugin warns of inside is found; what others say is dropped.

    Args:
        besides: Lines that are known already.
    """
    from swift.utils import get_logger

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage()
            if f'{os.sep}swift_gkd_plugin{os.sep}' in record.pathname and line not in besides:
                found.told(name, line)

    logger, handler = get_logger(), Collect(logging.WARNING)
    level, before = logger.level, logger.handlers[:]
    logger.handlers[:] = [handler]
    logger.setLevel('WARNING')
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.handlers[:] = before
