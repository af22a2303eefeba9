"""Where generated responses are written down: completions.jsonl, and the tables of wandb and SwanLab where a run reports to them."""

from __future__ import annotations

import os
from typing import Any, Literal

from swift.utils import JsonlWriter, swanlab_get_run


class Completions:
    """
    Args:
        args: ms-swift's arguments.
        write_on_rank: The rank that writes and that has the loggers.
    """

    def __init__(self, args, write_on_rank: Literal['master', 'last']):
        self.writer = JsonlWriter(os.path.join(args.output_dir, 'completions.jsonl'), write_on_rank=write_on_rank)
        self.loggers = set(args.report_to or ())
        self.has_tables = bool(self.loggers & {'wandb', 'swanlab'})
        self.unique_prompts = bool(args.wandb_log_unique_prompts)
        self._lines: list[dict[str, Any]] = []  # since the last table

    def append(self, lines: list[tuple[dict[str, Any], str]]) -> None:
        """The lines of all ranks, each with its prompt as the model reads it, which is what ms-swift's tables show."""
        self.writer.append([line for line, _ in lines])
        if self.writer.is_write_rank and self.has_tables:
            self._lines += [{**line, 'prompt': prompt} for line, prompt in lines]

    def show(self) -> None:
        """A table ``completions`` of what came since the last one, as ms-swift's own trainers make it."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        headers = list(lines[0])
        rows = [[line[name] for name in headers] for line in lines]
        if 'wandb' in self.loggers:
            import wandb

            if wandb.run is not None:
                place = headers.index('prompt')
                shown = list({row[place]: row for row in reversed(rows)}.values())[::-1] if self.unique_prompts else rows
                wandb.log({'completions': wandb.Table(columns=headers, data=shown)}, commit=False)
        if 'swanlab' in self.loggers and swanlab_get_run() is not None:
            import swanlab

            swanlab.log({'completions': swanlab.echarts.Table().add(headers, rows)})
