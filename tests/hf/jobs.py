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
from transformers import PreTrainedModel, TrainerCallback


class Recorder(TrainerCallback):
    """Keeps what a run saw beside its logs.

    ``gradients-<step>.pt``: each step's gradient, before clipping. ``seen.json``: the longest input of the student in tokens, on which
    sides its batches were padded, the largest dropout, and how often the template's forward context was entered.
    """

    def __init__(self, args, trainer):
        super().__init__()
        self.trainer = trainer
        self.seen = {'longest': 0, 'padded_left': False, 'padded_right': False, 'dropout': 0.0, 'forward_contexts': 0}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        seen, template = self.seen, self.trainer.template
        seen['dropout'] = max((m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)), default=0.0)
        forward_context = template.forward_context

        def counted(*args):
            seen['forward_contexts'] += 1
            return forward_context(*args)

        def look(module, inputs):
            if model.training:
                seen['longest'] = max(seen['longest'], inputs[0].shape[1])
                pad = inputs[0] == model.config.pad_token_id
                seen['padded_left'] |= bool(pad[:, 0].any())
                seen['padded_right'] |= bool(pad[:, -1].any())

        template.forward_context = counted
        model.get_input_embeddings().register_forward_pre_hook(look)

    def on_train_end(self, args, state, control, **kwargs):
        if args.process_index == 0:
            Path(args.output_dir, 'seen.json').write_text(json.dumps(self.seen))

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
    if os.environ.get('DS_ACCELERATOR') == 'cpu' and 'RANK' in os.environ:
        import deepspeed

        deepspeed.init_distributed('gloo')  # before any model asks for ZeRO-3; it would pick a back end of its own
    if os.environ.get('SWIFT_GKD_PLUGIN') != '0':
        from swift_gkd_plugin import register

        register()
    from swift.arguments import SftArguments
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main

    def allow_sdpa(self):
        # ms-swift wants flash attention for packed rows, which has no CPU kernel. transformers' sdpa builds the same block-diagonal mask
        # from the position ids, slowly.
        self.padding_free = self.padding_free or self.packing

    SftArguments._check_padding_free = allow_sdpa
    loaded = []
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def counted(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return from_pretrained(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(counted)
    callbacks_map['recorder'] = Recorder
    callbacks_map['stop_at'] = StopAt
    jobs = json.loads(Path(path).read_text())
    rank = int(os.environ.get('RANK', 0))
    for job in jobs:
        os.environ['STOP_AT'] = str(job.get('stop_at', -1))
        error, trace = None, ''
        loaded.clear()
        try:
            rlhf_main(job['argv'])
        except BaseException as e:
            error = f'{type(e).__name__}: {e}'
            trace = traceback.format_exc()
            print(trace, flush=True)
        if rank == 0:
            Path(job['output_dir'], 'outcome.json').write_text(json.dumps({'error': error, 'loaded': len(loaded), 'traceback': trace}))


if __name__ == '__main__':
    main(sys.argv[1])
