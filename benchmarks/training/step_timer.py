"""``--external_plugins step_timer.py --callbacks step_timer``: seconds of each optimizer step, generation included, in ``steps.json``."""

import json
import time
from pathlib import Path

from swift.callbacks import callbacks_map
from transformers import TrainerCallback


class StepTimer(TrainerCallback):
    def __init__(self, args, trainer):
        super().__init__()
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_train_end(self, args, state, control, **kwargs):
        seconds = [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]
        Path(args.output_dir, 'steps.json').write_text(json.dumps(seconds))


callbacks_map['step_timer'] = StepTimer
