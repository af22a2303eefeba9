"""``--external_plugins`` of every configuration: what a rank tells about its memory, and what it needs on a machine without a GPU."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

import torch
from swift.callbacks import callbacks_map
from transformers import TrainerCallback

RANK = os.environ.get('RANK', '0')


def tell_peaks() -> None:
    """What torch's allocator has reserved at most, on each device that this rank sees; without a GPU the process's memory. In bytes."""
    if torch.cuda.is_available():
        peaks = [torch.cuda.max_memory_reserved(device) for device in range(torch.cuda.device_count())]
    else:
        peaks = [1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    for device, peak in enumerate(peaks):
        Path(os.environ['CHECK_CLUSTER_OUT'], f'peak-{RANK}-{device}.json').write_text(json.dumps(peak))


class Reserve(TrainerCallback):
    """``--callbacks reserve``: after each step torch's allocator holds half of the device, as after the activations of a large model.

    An engine that sleeps meanwhile finds room to wake only if that is given back.
    """

    def __init__(self, args, trainer):
        super().__init__()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == 'cuda':
            torch.empty(torch.cuda.get_device_properties(args.device).total_memory // 2, dtype=torch.uint8, device=args.device)


callbacks_map['reserve'] = Reserve
if 'swift.megatron' in sys.modules:
    from swift.megatron.callbacks import MegatronCallback, megatron_callbacks_map

    class NoCheckpoint(MegatronCallback):
        """Megatron-SWIFT saves after the last step, whatever ``--save_steps`` says (4.6.0, callbacks/default_flow.py), which takes longer
        than the steps. It has to come behind that callback, as only those of ``--report_to`` do."""

        def on_step_end(self):
            self.state.should_save = False

    megatron_callbacks_map['no_checkpoint'] = NoCheckpoint
if multiprocessing.parent_process() is None:  # data loaders may import it too
    atexit.register(tell_peaks)
    if os.environ.get('DS_ACCELERATOR') == 'cpu' and 'RANK' in os.environ:
        import deepspeed

        deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False  # would be compiled, for a minute; gloo has an all-reduce
        deepspeed.init_distributed('gloo')  # before any model asks for ZeRO-3; it would pick a back end of its own
