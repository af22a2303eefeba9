"""What the groups of a Ray run's file mean: the options of the ranks, and the engines that have GPUs of their own.

An engine is a server of ms-swift: ``swift rollout`` for the group ``rollout``, which gets the student's weights from the ranks, ``swift
deploy`` for ``teacher``. ms-swift's own Ray loop (4.6.0, ray/megatron/rollout) has the same vLLM engine in actors, asked by the driver.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from swift.arguments import DeployArguments, RolloutArguments
from swift.arguments.base_args.model_args import ModelArguments
from swift.arguments.base_args.template_args import TemplateArguments
from swift.rlhf_trainers.args_mixin import VllmArguments
from swift.utils import json_parse_to_dict

from ..arguments import OptionError


def _names(*classes: type) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls)}


# Options of training that are none of an engine's, though its class has them.
OF_TRAINING = {'max_length', 'truncation_strategy', 'padding_side', 'padding_free', 'loss_scale', 'is_binary_loss_scale'}
OF_TRAINING |= {'sequence_parallel_size', 'add_non_thinking_prefix', 'disable_ignore_empty_think'}
OF_TEMPLATE = _names(TemplateArguments) - OF_TRAINING | {'external_plugins', 'custom_register_path', 'model_kwargs', 'use_hf', 'hub_token'}
OF_STUDENT = OF_TEMPLATE | _names(ModelArguments)
OF_VLLM = _names(VllmArguments)
# What the plugin gives to an engine, or takes from its GPUs.
OURS = {'host', 'port', 'infer_backend', 'api_key', 'ssl_keyfile', 'ssl_certfile'}


@dataclass(frozen=True)
class Group:
    """The engines of a group with GPUs of its own, all of them alike.

    Attributes:
        name: Of the group.
        command: The module of ms-swift's command.
        options: Of that command.
        size: GPUs of each engine, on one node.
        engines: How many there are.
    """

    name: str
    command: str
    options: dict[str, Any]
    size: int
    engines: int


def per_node(pipeline: Any, name: str) -> int:
    """GPUs of a group on each of its nodes.

    Raises:
        OptionError: They do not split evenly.
    """
    gpus, nnodes = pipeline.group_gpus[name], max(pipeline.ray_config.nnodes, 1)
    if gpus % nnodes:
        raise OptionError(f'{name}.gpus {gpus} on nnodes {nnodes}: a group has as many GPUs on each of its nodes; make it a multiple.')
    return gpus // nnodes


def split_options(pipeline: Any) -> tuple[dict[str, Any], list[Group]]:
    """The options of each rank, but for the addresses of engines, and the groups of engines.

    A rank has those of all groups, of ``train``, and of an engine that shares its devices; an engine those of all groups that are about
    vLLM, about the student or, for the teacher, about the template, and those of its group.

    Raises:
        OptionError: A group that this pipeline has no use for, or options that exclude each other.
    """
    gpus, alone = pipeline.group_gpus, pipeline.ray_config.own_options
    if gpus['train'] < 1:
        raise OptionError(f'train.gpus {gpus["train"]}: the training needs at least 1.')
    for name in ('rollout', 'teacher'):
        if alone[name] and not gpus[name]:
            raise OptionError(f'{name}.{next(iter(alone[name]))}: the group {name} has no gpus; give them, or leave the group out.')
    options, found = {k: v for k, v in pipeline.group_cfgs['train'].items() if k != 'use_ray'}, []
    if gpus['rollout'] and pipeline._is_rollout_hybrid():
        unknown = [name for name in alone['rollout'] if not name.startswith('vllm_')]
        if unknown:
            raise OptionError(f'rollout.{unknown[0]}: not an option of the engine, whose options begin with vllm_; leave it out.')
        options |= alone['rollout'] | {'use_vllm': True, 'vllm_mode': 'colocate', 'sleep_level': pipeline.ray_config.sleep_level}
    elif gpus['rollout']:
        found.append(_rollout(pipeline, options, alone['rollout']))
        options |= {'use_vllm': True, 'vllm_mode': 'server'}
    if gpus['teacher']:
        found.append(_teacher(pipeline, options, alone['teacher']))
        options = {k: v for k, v in options.items() if k not in ('teacher_model', 'teacher_model_type', 'teacher_model_revision')}
    return options, found


def _rollout(pipeline: Any, options: dict[str, Any], own: dict[str, Any]) -> Group:
    gpus = pipeline.group_gpus['rollout']
    for name in ('vllm_server_base_url', 'vllm_server_host', 'vllm_server_port', 'vllm_server_group_port'):
        if options.get(name):
            raise OptionError(f'rollout.gpus {gpus} and {name} {options[name]}: the group has servers of its own; give one of them.')
    if options.get('vllm_mode') == 'colocate':
        raise OptionError(
            f"rollout.gpus {gpus} with vllm_mode colocate: these GPUs are none of the training's; add colocate_groups: [[train, rollout]], "
            'with as many as train.gpus, or leave vllm_mode out.'
        )
    base = {k: v for k, v in options.items() if k in OF_STUDENT}
    if options.get('truncation_strategy') == 'left':  # the engine has to see what the ranks train on
        base |= {k: options[k] for k in ('truncation_strategy', 'max_length') if k in options}
    return _group(pipeline, 'rollout', 'swift.cli.rollout', RolloutArguments, base, own)


def _teacher(pipeline: Any, options: dict[str, Any], own: dict[str, Any]) -> Group:
    gpus, topk, server = pipeline.group_gpus['teacher'], options.get('gkd_logits_topk'), options.get('teacher_model_server')
    topk = 1 if options.get('gkd_signal') == 'sampled' else topk
    if topk is None:
        raise OptionError(f'teacher.gpus {gpus} without gkd_logits_topk: engines send the k largest log-probabilities; say how many.')
    if server is not None:
        raise OptionError(f'teacher.gpus {gpus} and teacher_model_server {server}: the group has servers of its own; give one of them.')
    ours, above = own.get('model'), options.get('teacher_model')
    if None not in (ours, above) and ours != above:
        raise OptionError(f'teacher.model {ours} and teacher_model {above}: give one of them.')
    model = ours or above
    if model is None:  # as in stock: the weights that the student starts from
        base = {k: v for k, v in options.items() if k in OF_STUDENT}
    else:
        named = {name: options.get(f'teacher_{name}') for name in ('model_type', 'model_revision')}
        base = {k: v for k, v in options.items() if k in OF_TEMPLATE or k == 'torch_dtype'} | {'model': model}
        base |= {k: v for k, v in named.items() if v is not None}
    group = _group(pipeline, 'teacher', 'swift.cli.deploy', DeployArguments, base, own)
    # swift deploy has an option for what stock's file says in the engine's.
    engine = dict(json_parse_to_dict(group.options.get('vllm_engine_kwargs')))
    most = max(topk, engine.pop('max_logprobs', 0), group.options.get('max_logprobs', 0))
    given = group.options | {'infer_backend': 'vllm', 'max_logprobs': most, 'vllm_engine_kwargs': engine}
    return dataclasses.replace(group, options=given)


def _group(pipeline: Any, name: str, command: str, arguments: type, base: dict[str, Any], own: dict[str, Any]) -> Group:
    """
    Args:
        arguments: The class of the command's options.
        base: Options of the whole file that the engine has too.
        own: Options of the group.
    """
    gpus, here = pipeline.group_gpus[name], per_node(pipeline, name)
    words = command.rpartition('.')[2]
    for option in own:
        if option in OURS or option not in _names(arguments):
            why = 'the plugin gives it' if option in OURS else f'not an option of swift {words}'
            raise OptionError(f'{name}.{option}: {why}; leave it out.')
    options = base | {k: v for k, v in pipeline.shared_cfg.items() if k in OF_VLLM} | own
    if options.get('model') is None:
        raise OptionError(f'{name}.gpus {gpus} without a model: say which weights its engines start from.')
    sizes = ('vllm_tensor_parallel_size', 'vllm_pipeline_parallel_size', 'vllm_data_parallel_size')
    given = {size: int(options[size]) for size in sizes if size in options}
    size = math.prod(given.values())
    if size < 1 or here % size:
        sizes = ' x '.join(f'{option} {value}' for option, value in given.items())
        raise OptionError(
            f'{name}.gpus {gpus} on nnodes {max(pipeline.ray_config.nnodes, 1)}: an engine has {sizes} GPUs of one node, and each node has '
            f'{here} for this group; change one of them.'
        )
    return Group(name, command, options, size, gpus // size)
