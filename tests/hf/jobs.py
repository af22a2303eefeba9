"""Many training runs in one process: ``python jobs.py jobs.json``, alone or under torchrun.

Each job is an argument list for ``swift.pipelines.rlhf_main``, the function behind ``swift rlhf``; one process saves the ten seconds of
imports that a command costs. With SWIFT_GKD_PLUGIN=0 the same jobs run stock ms-swift.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback


class Recorder(TrainerCallback):
    """Keeps each step's gradient, before clipping could touch it, as ``gradients-<step>.pt`` beside the logs."""

    def __init__(self, args, trainer):
        super().__init__()
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        if args.process_index == 0:
            torch.save(gradients, Path(args.output_dir) / f'gradients-{state.global_step + 1}.pt')


class StopAt(TrainerCallback):
    """Kills the run in the middle: an exception after the step that the environment variable names."""

    def __init__(self, args, trainer):
        super().__init__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ['STOP_AT']):
            raise KeyboardInterrupt


def main(path: str) -> None:
    if os.environ.get('SWIFT_GKD_PLUGIN') != '0':
        from swift_gkd_plugin import register

        register()
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main

    callbacks_map['recorder'] = Recorder
    callbacks_map['stop_at'] = StopAt
    jobs = json.loads(Path(path).read_text())
    rank = int(os.environ.get('RANK', 0))
    for job in jobs:
        os.environ['STOP_AT'] = str(job.get('stop_at', -1))
        error = None
        try:
            rlhf_main(job['argv'])
        except BaseException as e:
            error = f'{type(e).__name__}: {e}'
            traceback.print_exc()
        if rank == 0:
            Path(job['output_dir'], 'outcome.json').write_text(json.dumps({'error': error}))


if __name__ == '__main__':
    main(sys.argv[1])
