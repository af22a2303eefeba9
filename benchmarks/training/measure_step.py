"""A trainer callback for `--external_plugins`: seconds and peak memory of each training step, as JSON lines.

Written to the file that the variable STEP_LOG names: {"step": 1, "seconds": ..., "above_weights_gb": ...}. Memory is that of the process
(of the GPU, where training is on one) above what it held when training began, the models' weights included in the latter; so gradients
and optimizer state count. On a GPU also "weights_gb", what was there when training began, and "reserved_gb", what torch's allocator
held at most.
"""

import json
import os
import time
from pathlib import Path

import torch
from swift.callbacks import callbacks_map
from transformers import TrainerCallback


def _status_gb(field: str) -> float:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field + ':'):
            return int(line.split()[1]) * 1024 / 1e9
    raise KeyError(field)


def start_peak() -> float:
    """GB in use; the peak counts from here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    Path('/proc/self/clear_refs').write_text('5')
    return _status_gb('VmRSS')


def peak() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9
    return _status_gb('VmHWM')


class MeasureStep(TrainerCallback):
    def __init__(self, args, trainer):
        super().__init__()

    def on_train_begin(self, args, state, control, **kwargs):
        self.weights = start_peak()

    def on_step_begin(self, args, state, control, **kwargs):
        start_peak()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        most = peak()  # waits for a GPU
        found = {'step': state.global_step, 'seconds': time.perf_counter() - self.started, 'above_weights_gb': most - self.weights}
        if torch.cuda.is_available():
            found |= {'weights_gb': self.weights, 'reserved_gb': torch.cuda.max_memory_reserved() / 1e9}
        with open(os.environ['STEP_LOG'], 'a') as file:
            file.write(json.dumps(found) + '\n')


callbacks_map['measure_step'] = MeasureStep
