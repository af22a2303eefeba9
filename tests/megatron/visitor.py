"""A plugin of ms-swift (``--external_plugins``): a callback that has a teacher built and asked on its own layout, for nothing."""

import random
from functools import partial

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from swift.megatron.callbacks import megatron_callbacks_map
from swift.megatron.callbacks.base import MegatronCallback


class Visitor(MegatronCallback):
    """Asks a teacher before each step, and draws from every generator while its layout is in place."""

    def on_train_begin(self) -> None:
        from swift_gkd_plugin.megatron.layouts import RelocatedTeacher, common_padding
        from swift_gkd_plugin.megatron.placement import build_teacher, load_teacher

        trainer, count = self.trainer, self.trainer.conductor._count
        chunks, layout = build_teacher(trainer.args)
        load_teacher(trainer.args, chunks, layout)
        teacher = RelocatedTeacher(trainer.args, layout, chunks)
        template, padding_to = trainer.template, common_padding(trainer.args, layout.args)[0]

        def visited(batches):
            collator = template.data_collator
            template.data_collator = partial(collator, padding_to=padding_to)
            signals = teacher.signals([trainer.conductor.encoder.micro_batch(batch.samples) for batch in batches])
            template.data_collator = collator
            assert len(signals) == len(batches)
            with layout.entered():
                random.random(), numpy.random.rand(), torch.rand(3)
                with get_cuda_rng_tracker().fork():
                    torch.rand(3)
            return count(batches)

        trainer.conductor._count = visited


megatron_callbacks_map['visitor'] = Visitor
