"""``--reward_model``: frozen models that score responses, each a whole copy on every rank.

Ranks score their own responses, some of them none. So the models are not spread over ranks, whatever the student is: no rank has to take
part in what another one scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import patch_environment
from swift.model import get_model_info_meta
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.utils import disable_deepspeed_zero3
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from ..arguments import OptionError
from ..memory.sizes import empty_model
from ..rewards import RewardModel
from ..step.said import in_one_line


@dataclass(frozen=True)
class Named:
    """One of ``--reward_model``, with what belongs to it; None where ms-swift finds out."""

    path: str
    model_type: str | None
    revision: str | None
    template: str | None
    plugin: str


def named(args: Any) -> list[Named]:
    """Those of a run."""
    models = args.reward_model
    if not models:
        return []
    nothing = [None] * len(models)
    parts = (args.reward_model_type, args.reward_model_revision, args.reward_template)
    plugins = args.reward_model_plugin or ['default'] * len(models)
    return [Named(*one) for one in zip(models, *(part or nothing for part in parts), plugins, strict=True)]


def check(args: Any) -> None:
    """Raises:
    OptionError: ms-swift does not know what kind of model one is, or which template it has. No weights have been touched.
    """
    for one in named(args):
        try:
            _, processor = args.get_model_processor(**_which(args, one), load_model=False)
            _template(args, one, processor)
        except Exception as error:  # of ms-swift, transformers or a hub
            raise OptionError(
                f'--reward_model {one.path}: {in_one_line(error).rstrip(".")}. Name what it is with --reward_model_type and '
                '--reward_template.'
            ) from error


def _info(args: Any, one: Named) -> Any:
    """What ms-swift knows of it."""
    hub = {'use_hf': args.use_hf, 'hub_token': args.hub_token}
    return get_model_info_meta(one.path, model_type=one.model_type, revision=one.revision, **hub)[0]


def _which(args: Any, one: Named) -> dict[str, Any]:
    """For ``get_model_processor``, which takes the student's type where it is given none."""
    return {'model': one.path, 'model_type': _info(args, one).model_type, 'revision': one.revision}


def _template(args: Any, one: Named, processor: Any) -> Any:
    return args.get_template(processor, template_type=one.template or processor.model_meta.template)


def empty(args: Any, one: Named) -> tuple[nn.Module, bool]:
    """The model without memory, and whether it is the one that will be loaded: of a model's own code ms-swift makes a language model."""
    info = _info(args, one)
    task_type, num_labels = SwiftRLHF._get_model_task_type(info.model_dir)
    scores, plain = task_type == 'seq_cls', not info.quant_method and args.quant_method in (None, 'none')
    config = AutoConfig.from_pretrained(info.model_dir, trust_remote_code=True)
    if scores and type(config) in AutoModelForSequenceClassification._model_mapping:
        config.num_labels = num_labels
        with torch.device('meta'), disable_deepspeed_zero3():
            return AutoModelForSequenceClassification.from_config(config, dtype=args.torch_dtype), plain
    return empty_model(args, **_which(args, one)).requires_grad_(False), plain and not scores


def loaded(args: Any, load: Callable[[Named], tuple[nn.Module, Any]]) -> Iterator[RewardModel]:
    """The models on the device of this rank.

    Args:
        load: Loads one as ms-swift does, frozen and in eval mode, with its processor.
    """
    for one in named(args):
        with _whole():
            model, processor = load(one)
        template = _template(args, one, processor)
        if template.use_model:
            template.model = model
        if not getattr(model, 'is_quantized', False):  # which is where it belongs
            model.to(args.training_args.device)
        yield RewardModel(model, template, one.plugin, args.per_device_train_batch_size)


@contextmanager
def _whole() -> Iterator[None]:
    """Neither ZeRO-3 nor FSDP take a part in how weights load."""
    with disable_deepspeed_zero3(), patch_environment(ACCELERATE_USE_FSDP='false'):
        yield
