"""A plugin of ms-swift (``--external_plugins``) with a callback that weighs what the last rank has allocated, into memory.json."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from swift.megatron.callbacks import megatron_callbacks_map
from swift.megatron.callbacks.base import MegatronCallback


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class MemoryProbe(MegatronCallback):
    def on_train_begin(self) -> None:
        self.seen = {}
        signals = self.trainer.teacher.signals

        def weighed(batches, topk=None):
            found = signals(batches, topk)
            states = [signal.hidden for signal in found if signal is not None]
            self.seen['payload'], self.seen['trained tokens'] = size(states), sum(map(len, states))
            return found

        self.trainer.teacher.signals = weighed

    def on_train_end(self) -> None:
        trainer = self.trainer
        buffers = [b for model in trainer.wrapped_models for b in (*model.buffers, *model.expert_parallel_buffers)]
        optimizers = getattr(trainer.optimizer, 'chained_optimizers', [trainer.optimizer])
        states = [t for o in optimizers for state in o.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        main = [p for o in optimizers for group in o.shard_fp32_from_float16_groups for p in group]
        head = trainer.teacher.loss_head
        self.seen |= {
            'student weights': size(p for model in trainer.unwrapped_models for p in model.parameters()),
            'student gradients': size(b.grad_data for b in buffers),
            'optimizer': size(main) + size(t for t in states if t.numel() > 1),
            'teacher weights': size(p for chunk in trainer.teacher.chunks for p in chunk.parameters()),
            'teacher head': 0 if head is trainer.teacher.head else size([head.tensors().weight]),
        }
        if dist.get_rank() == dist.get_world_size() - 1:
            Path(self.args.output_dir, 'memory.json').write_text(json.dumps(self.seen))


megatron_callbacks_map['memory_probe'] = MemoryProbe
