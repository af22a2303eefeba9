"""``swift-gkd doctor [--json] [--gpu-memory GIB] [[--] TRAINING COMMAND]``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .findings import Findings
from .training import Command, UsageError, arguments

GIB = 2**30


def main(words: Sequence[str] | None = None) -> int:
    """
    Args:
        words: Behind ``swift-gkd doctor``; those of this process if left out.

    Returns:
        The exit status: 1 if a run would end, or should, 2 for words that mean nothing here, else 0.
    """
    own, appended = _split(sys.argv[1:] if words is None else list(words))
    parser = argparse.ArgumentParser(
        prog='swift-gkd doctor',
        description='Looks at this environment, and at a training command without loading weights. Nothing is trained, nothing is written.',
        usage='%(prog)s [--json] [--gpu-memory GIB] [[--] [NAME=VALUE …] swift rlhf … | megatron rlhf … | OPTIONS]',
    )
    parser.add_argument('--json', action='store_true', help='print what is found for scripts')
    parser.add_argument('--gpu-memory', type=float, metavar='GIB', help='of a card, if the run is for another machine')
    given = parser.parse_args(own)
    try:
        command = Command.of(appended) if appended else None
        ranks = command.enter() if command else 1
    except UsageError as error:
        parser.error(str(error))
    found = Findings()
    with quiet():
        examine(command, ranks, given.gpu_memory, found)
    print(found.as_json() if given.json else found)
    return found.status


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, which come first, and what is appended."""
    place = 0
    while place < len(words):
        name = words[place].partition('=')[0]
        if name == '--gpu-memory' and '=' not in words[place]:
            place += 2
        elif name in ('--json', '--gpu-memory', '-h', '--help'):
            place += 1
        else:
            break
    appended = words[place:]
    return words[:place], appended[1:] if appended[:1] == ['--'] else appended


def examine(command: Command | None, ranks: int, gpu_memory: float | None, found: Findings) -> None:
    """
    Args:
        command: None for the environment alone.
        ranks: Of the command.
        gpu_memory: GiB of a card that is not here.
        found: Takes what there is.
    """
    from . import environment

    environment.examine(found, command and command.needs())
    if command is None:
        return
    with arguments(command, ranks, found) as args:
        if args is not None:
            _examine_run(command, args, ranks, gpu_memory, found)


def _examine_run(command: Command, args: Any, ranks: int, gpu_memory: float | None, found: Findings) -> None:
    from ..memory.verdict import Card
    from . import models, rows, run

    with found.refusals('models'):
        patient = (run.MegatronRun if command.megatron else run.TransformersRun)(args, ranks)
        fine = run.check(patient, found)
        run.describe(patient, found)
        processor = args.get_model_processor(load_model=False)[1]
        template = args.get_template(processor)
        template.set_mode('train')
        student, teacher = models.Model.of(args.model, processor), None
        if args.teacher_model is not None:
            which = {'model': args.teacher_model, 'model_type': args.teacher_model_type, 'revision': args.teacher_model_revision}
            teacher = models.Model.of(args.teacher_model, args.get_model_processor(load_model=False, **which)[1])
        card = Card.of_this_rank() if gpu_memory is None else Card('the card', int(gpu_memory * GIB))
        columns = models.vocabularies(student, teacher, patient.tokens, found)
        models.compare(args, template, student, teacher, found)
        models.equality(args, patient.datasets[0], found)
        stop = models.stop_id(template)
        lengths = rows.examine(args, template, patient.datasets[0], student.ends | ({stop} - {None}), found)
        run.length(patient, found, lengths)
        run.operator(patient, found, card is not None, columns)
        if fine:
            run.plan(patient, found, card)
        else:
            found.section = 'memory'
            found.note('memory', 'Memory is not planned for a run that is refused.', 'Mend the errors above and ask again.')


@contextmanager
def quiet() -> Iterator[None]:
    """What libraries print goes to a file that nobody keeps; should something fail in here, its end is shown."""
    os.environ.setdefault('LOG_LEVEL', 'ERROR')  # ms-swift's
    os.environ.setdefault('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')
    sys.stdout.flush()
    with tempfile.TemporaryFile('w+') as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        failed = True
        try:
            for stream, _ in kept:
                os.dup2(file.fileno(), stream)
            yield
            failed = False
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)
            if failed:
                file.seek(0)
                sys.stderr.write(file.read()[-4000:])


if __name__ == '__main__':
    sys.exit(main())
