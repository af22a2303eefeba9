"""Whether command lines hold, without running them: unknown options, values out of range, layouts that do not split.

``python parse.py swift|megatron SOURCE TARGET``: SOURCE has a JSON list of [ranks, arguments], TARGET gets a list of complaints or nulls.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from swift_gkd_plugin import register
from swift_gkd_plugin.arguments import OptionError, check_values
from swift_gkd_plugin.seams import take_options


def parser_of(command: str) -> ArgumentParser:
    """That of ``swift rlhf`` or ``megatron rlhf``, the plugin's options included."""
    if command == 'swift':
        from swift.arguments import RLHFArguments as Arguments
    else:
        from swift.megatron.arguments import MegatronRLHFArguments as Arguments
    from swift.utils.utils import _patch_get_type_hints  # its annotations are more than HfArgumentParser understands
    from transformers import HfArgumentParser

    with _patch_get_type_hints():
        return HfArgumentParser([Arguments])


def complaint(command: str, parser: ArgumentParser, ranks: int, argv: list[str]) -> str | None:
    said: list[str] = []
    parser.error = said.append
    args, rest = parser.parse_known_args(argv)
    if said or rest:
        return said[0] if said else f'unknown: {" ".join(rest)}'
    try:
        take_options(args)
        if command == 'megatron':
            from swift_gkd_plugin.megatron.options import check_layout, check_supported

            os.environ['WORLD_SIZE'] = str(ranks)
            check_supported(args)
            check_layout(args)
        check_values(args)
    except OptionError as error:
        return str(error)
    return None


def main(command: str, source: str, target: str) -> None:
    register()
    parser = parser_of(command)
    lines = json.loads(Path(source).read_text())
    Path(target).write_text(json.dumps([complaint(command, parser, ranks, argv) for ranks, argv in lines]))


if __name__ == '__main__':
    main(*sys.argv[1:])
