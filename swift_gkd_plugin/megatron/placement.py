"""Which local teacher a run has, and where it is: in the student's layout, in its own, or in the student's own weights."""

from __future__ import annotations

from contextlib import nullcontext

from swift.megatron.model import get_mcore_model
from swift.utils import get_current_device, get_logger
from torch import nn
from transformers import AutoConfig

from ..arguments import extrapolates, teacher_offload
from ..sources import STUDENT, TEACHER
from .adapters import MergedAdapters
from .average import ShardedAverage
from .generation import check_generates
from .head import OutputHead
from .layouts import Layout, RelocatedTeacher, TrackedRandomState
from .options import num_experts, said_once, teacher_arguments, teacher_options
from .teachers import AveragedStudent, LiveStudent, LocalTeacher, Reference, SharedBase

logger = get_logger()


def build_teacher(args) -> tuple[list[nn.Module], Layout | None]:
    """The teacher's chunks, built from its own family and configuration, and its layout if that is not the student's."""
    config = AutoConfig.from_pretrained(args.teacher_model_dir, trust_remote_code=True)
    theirs = teacher_arguments(args, bool(num_experts(config)))
    theirs.model, theirs.model_dir, theirs.model_type = args.teacher_model, args.teacher_model_dir, args.teacher_model_type
    theirs.model_info, theirs.model_meta = args.teacher_model_info, args.teacher_model_meta
    theirs.megatron_model_meta = args.teacher_megatron_model_meta
    theirs.is_multimodal = args.teacher_model_meta.is_multimodal
    theirs.rope_scaling = None  # the student's, and the teacher's configuration has its own
    layout = Layout(theirs) if teacher_options(args) else None
    numbers = TrackedRandomState()  # the student's adapter is drawn as if there were no other model
    with layout.entered() if layout else nullcontext():
        chunks = get_mcore_model(theirs, config)
    numbers.restore()
    return chunks, layout


def merged_adapters(args, chunks: list[nn.Module] | None) -> MergedAdapters | None:
    """``--teacher_adapters``, ready to be added to the teacher's weights; None without.

    Args:
        chunks: The teacher's, if one is loaded.

    Raises:
        OptionError: They are adapters of another model.
    """
    if chunks is None or not args.teacher_adapters:
        return None
    with said_once():
        return MergedAdapters(args.teacher_adapters, args.teacher_model, args.teacher_model_dir, chunks[0].config.bridge)


def load_teacher(args, chunks: list[nn.Module], layout: Layout | None, adapters: MergedAdapters | None = None) -> None:
    """The weights, frozen, on the device."""
    with layout.entered() if layout else nullcontext():
        for chunk in chunks:
            if not args.use_cpu_initialization:
                chunk.to(get_current_device())
            chunk.requires_grad_(False).eval()
        chunks[0].config.bridge.load_weights(chunks, args.teacher_model_dir, converter=adapters)


def check_heads(*models: list[nn.Module] | None) -> None:
    """Raises:
    OptionError: A model does something to its logits that the loss would miss.
    """
    with said_once():
        for chunks in filter(None, models):
            OutputHead(chunks)


def check_who_generates(args, student: list[nn.Module], teacher: list[nn.Module] | None) -> None:
    """Raises:
    OptionError: A model is to answer in the training processes and cannot.
    """
    with said_once():
        if not args.use_vllm and (args.lmbda > 0 or args.gkd_eval_source == STUDENT):
            check_generates(student, f'--model {args.model}')
        elsewhere = args.teacher_model_server is not None or args.gkd_teacher_engine == 'vllm'
        if not elsewhere and (args.seq_kd or args.gkd_eval_source == TEACHER):
            check_generates(teacher or student, f'--teacher_model {args.teacher_model or args.model}')


def local_teacher(trainer) -> LocalTeacher:
    """The separate model, or one that lives in the student's."""
    args, chunks, offload = trainer.args, trainer.teacher_models, bool(teacher_offload(trainer.args))
    if trainer.teacher_layout is not None:
        return RelocatedTeacher(args, trainer.teacher_layout, chunks, offload)
    if chunks is not None:
        return LocalTeacher(args, chunks, offload)
    if args.gkd_self_teacher == 'ema':
        return AveragedStudent(args, trainer.unwrapped_models, average=ShardedAverage(args.gkd_ema_decay))
    with said_once():
        return (SharedBase if trainer._teacher_use_disable_adapter else LiveStudent)(args, trainer.unwrapped_models)


def reference_of(trainer) -> Reference | None:
    """``--gkd_extrapolation``."""
    if not extrapolates(trainer.args):
        return None
    with said_once():
        reference = Reference(trainer.args, trainer.unwrapped_models)
    logger.info(f'The teacher is extrapolated by {trainer.args.gkd_extrapolation:g} from {reference.description}.')
    return reference
