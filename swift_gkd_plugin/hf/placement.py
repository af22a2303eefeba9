"""Which local teacher a run has, and where its weights are."""

from __future__ import annotations

import torch
import torch.distributed as dist
from swift.template import update_generation_config_eos_token
from swift.utils import get_logger
from torch import nn

from ..arguments import extrapolates, teacher_offload
from ..teachers.average import AverageInOneFile, ShardedParameters, WholeParameters
from ..teachers.offload import HostCopy, LayerStream
from .head import language_model
from .shared_work import SharedWork
from .teachers import TEACHER_ADAPTER, AdapterOnBase, AveragedStudent, LiveStudent, LocalTeacher, Reference, SharedBase
from .zero3 import PartitionedParameters, is_zero3, ranks_share_weights

logger = get_logger()


def local_teacher(trainer) -> LocalTeacher:
    """The separate model, or one that lives in the student's."""
    if trainer.teacher_model is None:
        return _self_teacher(trainer)
    bare = trainer.accelerator.unwrap_model(trainer.teacher_model, keep_torch_compile=False)
    update_generation_config_eos_token(bare.generation_config, trainer.template)
    if trainer.is_fsdp_enabled:
        dist.fsdp.register_fsdp_forward_method(bare, 'generate')  # PEFT's goes past the root's forward
    return LocalTeacher(trainer.teacher_model, bare, host_copy(bare, teacher_offload(trainer.args), trainer.args.device))


def _self_teacher(trainer) -> LocalTeacher:
    bare = trainer.bare
    if trainer.args.gkd_self_teacher == 'ema':
        teacher = AveragedStudent(trainer.model, bare, average=AverageInOneFile(trainer.args.gkd_ema_decay))
    elif not trainer._teacher_use_disable_adapter:
        teacher = LiveStudent(trainer.model, bare)
    else:
        kind = AdapterOnBase if TEACHER_ADAPTER in bare.peft_config else SharedBase
        teacher = kind(trainer.model, bare)
    if not extrapolates(trainer.args):
        teacher.shared_work = _shared_work(trainer, 'Teacher')
    return teacher


def reference_of(trainer) -> Reference | None:
    """``--gkd_extrapolation``. It looks last before the student, and always sees what the student does: it is the one to share with."""
    if not extrapolates(trainer.args):
        return None
    reference = Reference(trainer.model, trainer.bare)
    reference.shared_work = _shared_work(trainer, 'Reference')
    logger.info(f'The teacher is extrapolated by {trainer.args.gkd_extrapolation:g} from {reference.description}.')
    return reference


def _shared_work(trainer, who: str) -> SharedWork | None:
    shared = SharedWork(trainer.bare, layers=not trainer.aux_loss_enabled)
    # Parts that do something else in every micro-batch would be compiled for each.
    if not shared or trainer.args.torch_compile:
        return None
    parts = ', '.join(type(tower).__name__ for tower in shared.towers)
    logger.info(f'{who} and student share the work of {parts or "no tower"} and the lowest {len(shared.layers)} layers.')
    return shared


def trained_parameters(trainer) -> WholeParameters:
    """What is trained, as the ranks hold it once training has begun."""
    if trainer.is_fsdp_enabled:
        return ShardedParameters(trainer.bare)
    if is_zero3(trainer.args.deepspeed):
        return PartitionedParameters(trainer.bare, trainer.model_wrapped)
    return WholeParameters(trainer.bare)


def host_copy(teacher: nn.Module, how: str | None, device: torch.device) -> HostCopy | LayerStream | None:
    """``--gkd_teacher_offload``. The output head stays on the device, for the loss comes after the teacher has left.

    Args:
        how: ``model``, ``layer`` or None.
        device: Where the weights visit.
    """
    if how is None:
        return None
    replica = None if ranks_share_weights(teacher) else 'whole'
    if how == 'layer':
        copy = LayerStream(teacher, device, replica)
    else:
        head = {id(p) for p in language_model(teacher).get_output_embeddings().parameters()}
        copy = HostCopy((getattr(p, 'ds_tensor', p) for p in teacher.parameters() if id(p) not in head), device, replica)
    visitors = {id(weight) for weight in copy.weights}
    for tensor in (*(getattr(p, 'ds_tensor', p) for p in teacher.parameters()), *teacher.buffers()):
        if id(tensor) not in visitors:
            tensor.data = tensor.data.to(device)
    logger.info(f'The teacher lives in {copy.memory}; {copy.bytes / 2**30:.2f} GiB come to the device with each visit.')
    return copy
