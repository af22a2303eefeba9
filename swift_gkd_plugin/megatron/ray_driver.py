"""``megatron rlhf --use_ray``: Ray places the ranks and starts them, and each runs what it would run under torchrun.

Of ms-swift's Ray pipeline (4.6.0) this keeps the YAML file, the placement groups and the environment of a worker. Its driver loop, which
collates on one process what all ranks need and has a loss and a teacher of its own, is not used: a step is told once, in ``step/``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from swift.ray.megatron.driver_utils import _dict_to_argv
from swift.ray.megatron.worker_group import WorkerGroup
from swift.utils import get_logger

from ..arguments import OptionError
from ..versions import __version__
from .ray_rank import Rank

logger = get_logger()

PACKAGE = __name__.partition('.')[0]
OTHERS_SECONDS = 5  # for the other ranks to say what they have to say, once one has failed
EXIT_SECONDS = 60  # for loggers to close what they have open


def start(pipeline: Any) -> None:
    """Have Ray place the ranks and start their processes.

    Args:
        pipeline: ms-swift's ``MegatronRayPipeline``, which has read its file.

    Raises:
        OptionError: What the file asks for is not there, or is none of ours.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise OptionError(
            f'--use_ray: torchrun has started {os.environ["WORLD_SIZE"]} processes of this command; leave out NPROC_PER_NODE and NNODES.'
        )
    pipeline.argv = command_line(pipeline)
    ray.init(ignore_reinit_error=True)
    _check_nodes(pipeline)
    pipeline._create_pools()
    pool = pipeline.resource_pool_manager.get_pool('train')
    pipeline.worker_groups['train'] = WorkerGroup.from_pool('train', pool, worker_cls=ray.remote(num_gpus=0)(Rank))
    nodes = {node['NodeID']: node['NodeManagerAddress'] for node in ray.nodes()}
    pipeline.places = [nodes[node] for node, _ in pool.bundle_infos]
    logger.info(f'swift-gkd-plugin {__version__}: {pool.world_size} ranks on {len({node for node, _ in pool.bundle_infos})} Ray nodes.')


def train(pipeline: Any, enter: Callable[[], None]) -> dict[str, Any]:
    """Run the ranks that :func:`start` has started to their end.

    Args:
        enter: Activates the plugin in a worker.

    Returns:
        Where the checkpoints are.

    Raises:
        OptionError: One that a rank has found.
        RayError: A rank has failed or died; the others are ended.
    """
    ranks = pipeline.worker_groups['train'].workers
    refs = [rank.run.remote(enter, pipeline.argv, os.getcwd(), __version__) for rank in ranks]
    _wait(refs, pipeline.places)
    # They leave by themselves: what is killed closes no logger.
    ray.wait([rank.__ray_terminate__.remote() for rank in ranks], num_returns=len(ranks), timeout=EXIT_SECONDS)
    return ray.get(refs[-1])


def command_line(pipeline: Any) -> list[str]:
    """The options of each rank: those of all groups, of ``train``, and of an engine that shares its devices.

    Raises:
        OptionError: A group that this pipeline has no use for.
    """
    gpus, groups = pipeline.group_gpus, pipeline.group_cfgs
    alone = {name: {k: v for k, v in groups[name].items() if pipeline.shared_cfg.get(k) != v} for name in groups}
    if gpus['train'] < 1:
        raise OptionError(f'train.gpus {gpus["train"]}: the training needs at least 1.')
    for name in ('rollout', 'teacher'):
        if alone[name] and not gpus[name]:
            raise OptionError(f'{name}.{next(iter(alone[name]))}: the group {name} has no gpus; give them, or leave the group out.')
    if gpus['teacher']:
        raise OptionError(
            f'teacher.gpus {gpus["teacher"]}: there are no workers for the teacher alone; give teacher_model, with a layout of its own '
            '(teacher_tensor_model_parallel_size, …) or gkd_teacher_engine: vllm if wanted, or the teacher_model_server of one that runs.'
        )
    options = {k: v for k, v in groups['train'].items() if k != 'use_ray'}
    if gpus['rollout']:
        if not pipeline._is_rollout_hybrid():
            raise OptionError(
                f'rollout.gpus {gpus["rollout"]}: there are no workers for the rollout alone; share the devices with '
                'colocate_groups: [[train, rollout]], or give vllm_mode: server with the vllm_server_host of a `swift rollout` that runs.'
            )
        unknown = [name for name in alone['rollout'] if not name.startswith('vllm_')]
        if unknown:
            raise OptionError(f'rollout.{unknown[0]}: not an option of the engine, whose options begin with vllm_; leave it out.')
        options |= alone['rollout'] | {'use_vllm': True, 'vllm_mode': 'colocate', 'sleep_level': pipeline.ray_config.sleep_level}
    return _dict_to_argv(options)


def _check_nodes(pipeline: Any) -> None:
    """Ray would wait for nodes that never come, and say nothing.

    Raises:
        OptionError: The cluster's nodes do not have what is asked for, whoever uses it at the moment.
    """
    per_node = pipeline.ray_config.gpus_as_process_on_nodes(pipeline.group_gpus['train'])[0]
    cpus = per_node * (2 if pipeline._is_rollout_hybrid() else 1)  # of a placement group of stock's
    nodes = [(int(node['Resources'].get('GPU', 0)), int(node['Resources'].get('CPU', 0))) for node in ray.nodes() if node['Alive']]
    nnodes = max(pipeline.ray_config.nnodes, 1)
    if sum(min(gpu // per_node, cpu // cpus) for gpu, cpu in nodes) < nnodes:
        there = ', '.join(f'{gpu} GPUs and {cpu} CPUs' for gpu, cpu in nodes)
        raise OptionError(
            f'train.gpus {pipeline.group_gpus["train"]} on nnodes {nnodes}: each node needs {per_node} GPUs and {cpus} CPUs for them, and '
            f'the nodes of the Ray cluster have {there}; start more of them (`ray start`) or ask for fewer.'
        )


def _wait(refs: Sequence[Any], places: Sequence[str]) -> None:
    """Return when all ranks have ended well.

    Args:
        places: The node of each, for messages.

    Raises:
        OptionError: One that a rank has found.
        RayError: A rank has failed or died.
    """
    waiting, errors = list(refs), []
    while waiting and not errors:
        done, waiting = ray.wait(waiting)
        errors = _errors(refs, done)
    if not errors:
        return
    if waiting:
        errors += _errors(refs, ray.wait(waiting, num_returns=len(waiting), timeout=OTHERS_SECONDS)[0])
    rank, error = min(errors, key=lambda found: _likely_effect(found[1]))
    logger.error(f'Rank {rank} on {places[rank]} has failed; the other ranks are ended.')
    if f"No module named '{PACKAGE}'" in str(error):
        raise OptionError(f'--use_ray: swift-gkd-plugin is not installed on {places[rank]}; install it on every node.') from None
    if _is_ours(error):
        raise error.cause from None  # its line is enough
    raise error


def _errors(refs: Sequence[Any], done: Sequence[Any]) -> list[tuple[int, RayError]]:
    """Ranks that have failed, and with what."""
    errors = []
    for ref in done:
        try:
            ray.get(ref)
        except RayError as error:
            errors.append((refs.index(ref), error))
    return errors


def _is_ours(error: RayError) -> bool:
    return isinstance(error, RayTaskError) and type(error.cause).__module__.startswith(PACKAGE)


def _likely_effect(error: RayError) -> int:
    """How likely it is that another rank's failure is the reason: those who waited for one that has died may be heard before."""
    return 0 if _is_ours(error) else 1 if isinstance(error, ActorDiedError) else 2
