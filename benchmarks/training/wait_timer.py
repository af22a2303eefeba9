"""``--external_plugins wait_timer.py --callbacks wait_timer``: when the student computes and when it waits, in ``waits.json``.

Only what every trainer of transformers has is hooked: its model's forward in training, accelerate's ``backward``, and the forward of the
``teacher_model`` that ms-swift keeps. So it runs with any version of the plugin, and notes which one that was.
"""

import json
import sys
import time
from pathlib import Path

import torch
from swift.callbacks import callbacks_map
from transformers import TrainerCallback


class WaitTimer(TrainerCallback):
    """One entry for each step: its ``seconds``, and ``cpu``, those of a core that this process used; ``waits`` from the end of each
    backward pass (or of whatever came before training) to the student's next forward; ``update``, the seconds of the optimizer in front of
    the first of them; of the teacher the number of forwards (``looks``) and their seconds (``teacher``, without the output head), which
    are among the waits."""

    def __init__(self, args, trainer):
        super().__init__()
        self.trainer, self.steps = trainer, []
        self.waits, self.looks, self.teacher, self.update, self.updating = [], 0, 0.0, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        backward = trainer.accelerator.backward

        def timed(*arguments, **options):
            backward(*arguments, **options)
            self.idle_since = time.perf_counter()

        trainer.accelerator.backward = timed
        trainer.accelerator.unwrap_model(trainer.model).register_forward_pre_hook(self.student_begins)
        teacher = getattr(trainer, 'teacher_model', None)
        if teacher is not None:
            teacher.register_forward_pre_hook(self.teacher_begins)
            teacher.register_forward_hook(self.teacher_ends, always_call=True)  # it may be stopped in front of its head
        self.begin = self.idle_since = time.perf_counter()
        self.cpu_begin = time.process_time()

    def student_begins(self, model, inputs):
        if model.training and torch.is_grad_enabled():  # else it answers
            self.waits.append(time.perf_counter() - self.idle_since)

    def teacher_begins(self, model, inputs):
        self.looks += 1
        self.teacher -= time.perf_counter()

    def teacher_ends(self, model, inputs, outputs):
        self.teacher += time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.updating = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.updating = time.perf_counter() - self.updating

    def on_step_end(self, args, state, control, **kwargs):
        now, cpu = time.perf_counter(), time.process_time()
        step = {'seconds': now - self.begin, 'cpu': cpu - self.cpu_begin, 'waits': self.waits, 'update': self.update}
        self.steps.append({**step, 'teacher': self.teacher, 'looks': self.looks})
        self.cpu_begin = cpu
        self.begin, self.waits, self.looks, self.teacher, self.update = now, [], 0, 0.0, self.updating

    def on_train_end(self, args, state, control, **kwargs):
        plugin = sys.modules['swift_gkd_plugin'].__file__
        Path(args.output_dir, 'waits.json').write_text(json.dumps({'plugin': plugin, 'steps': self.steps}))


callbacks_map['wait_timer'] = WaitTimer
