"""A plugin of ms-swift (``--external_plugins``): a callback that has a teacher built and asked on its own layout, for nothing."""

import random

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from swift.megatron.callbacks import megatron_callbacks_map
from swift.megatron.callbacks.base import MegatronCallback


class Visitor(MegatronCallback):
    """Asks a teacher before each step, and draws from every generator while its layout is in place."""

    def on_train_begin(self) -> None:
        from swift_gkd_plugin.megatron.layouts import RelocatedTeacher

        trainer, asked = self.trainer, self.trainer._asked
        chunks = trainer._build_teacher()
        trainer._load_teacher(chunks)
        teacher = RelocatedTeacher(trainer.args, trainer.teacher_layout, chunks)

        def visited(batches):
            signals = teacher.signals(batches)
            assert len(signals) == len(batches)
            with trainer.teacher_layout.entered():
                random.random(), numpy.random.rand(), torch.rand(3)
                with get_cuda_rng_tracker().fork():
                    torch.rand(3)
            return asked(batches)

        trainer._asked = visited


megatron_callbacks_map['visitor'] = Visitor
