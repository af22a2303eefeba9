"""``megatron rlhf --use_ray``: Ray places the ranks and starts them, and each runs what it would run under torchrun.

Of ms-swift's Ray pipeline (4.6.0) this keeps the YAML file, the placement groups and the environment of a worker. Its driver loop, which
collates on one process what all ranks need and has a loss and a teacher of its own, is not used: a step is told once, in ``step/``. Engines
on GPUs of their own (``ray_groups.py``) are servers of ms-swift, which the ranks know as they know any other.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from swift.ray.megatron.driver_utils import _dict_to_argv
from swift.ray.megatron.worker_group import WorkerGroup
from swift.utils import get_logger

from ..arguments import OptionError
from ..serving import END_SECONDS
from ..versions import __version__
from .ray_engine import Engine
from .ray_groups import Group, per_node, split_options
from .ray_rank import Rank

logger = get_logger()

PACKAGE = __name__.partition('.')[0]
OTHERS_SECONDS = 5  # for the other ranks to say what they have to say, once one has failed
EXIT_SECONDS = 60  # for loggers to close what they have open
PATIENCE_SECONDS = 60  # for GPUs that others use, before something is said


def start(pipeline: Any) -> None:
    """Have Ray place the ranks and the engines and start their processes.

    Args:
        pipeline: ms-swift's ``MegatronRayPipeline``, which has read its file.

    Raises:
        OptionError: What the file asks for is not there, or is none of ours.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise OptionError(
            f'--use_ray: torchrun has started {os.environ["WORLD_SIZE"]} processes of this command; leave out NPROC_PER_NODE and NNODES.'
        )
    pipeline.rank_options, groups = split_options(pipeline)
    ray.init(ignore_reinit_error=True)
    _check_nodes(pipeline)
    with _said_if_it_takes_long():
        pipeline._create_pools()
    nodes = {node['NodeID']: node['NodeManagerAddress'] for node in ray.nodes()}
    pool = pipeline.resource_pool_manager.get_pool('train')
    pipeline.worker_groups['train'] = WorkerGroup.from_pool('train', pool, worker_cls=ray.remote(num_gpus=0)(Rank))
    pipeline.places = [nodes[node] for node, _ in pool.bundle_infos]
    for group in groups:
        # Where ms-swift keeps its own, and shuts them down at the end of the run, whatever that is.
        kept = pipeline.rollout_replicas if group.name == 'rollout' else pipeline.teacher_replicas
        kept += _placed(group, pipeline.resource_pool_manager.get_pool(group.name), nodes)
    logger.info(f'swift-gkd-plugin {__version__}: {pool.world_size} ranks on {len({node for node, _ in pool.bundle_infos})} Ray nodes.')


@dataclass(frozen=True)
class Placed:
    """An engine, as the driver sees it."""

    group: Group
    number: int
    place: str
    devices: str
    actor: Any

    @property
    def name(self) -> str:
        return f'{self.group.name} engine {self.number} on {self.place}'

    def shutdown(self) -> None:
        """As one of ms-swift's replicas."""
        ray.get(self.actor.close.remote(), timeout=END_SECONDS + 20)
        ray.kill(self.actor)


def _placed(group: Group, pool: Any, nodes: dict[str, str]) -> list[Placed]:
    """The actors of a group's engines. Each has ``group.size`` bundles of one placement group, and lives in the first of them."""
    visible, env = WorkerGroup._get_device_env_config()['visible_devices_key'], {'NCCL_CUMEM_ENABLE': '0'}  # as the ranks have it
    env |= {f'RAY_EXPERIMENTAL_NOSET_{kind}_VISIBLE_DEVICES': '1' for kind in ('CUDA', 'HIP', 'ROCR', 'ASCEND_RT')}
    found = []
    for number in range(group.engines):
        first = number * group.size
        bundle = divmod(first, pool.process_on_nodes[0])
        place = nodes[pool.bundle_infos[first][0]]
        devices = ','.join(map(str, pool.visible_devices[first : first + group.size]))
        actor = ray.remote(Engine).options(
            num_cpus=0,
            num_gpus=0,
            max_concurrency=3,
            scheduling_strategy=PlacementGroupSchedulingStrategy(pool.pgs[bundle[0]], placement_group_bundle_index=bundle[1]),
            runtime_env={'env_vars': {**env, visible: devices}},
        )
        found.append(Placed(group, number, place, devices, actor.remote(f'{group.name} engine {number} on {place}')))
    return found


def train(pipeline: Any, enter: Callable[[], None]) -> dict[str, Any]:
    """Run what :func:`start` has started to the end of the training.

    Args:
        enter: Activates the plugin in a worker.

    Returns:
        Where the checkpoints are.

    Raises:
        OptionError: One that a rank has found, or an engine that did not start or has ended.
        RayError: A rank has failed or died; the others are ended.
    """
    group = pipeline.worker_groups['train']
    engines = pipeline.rollout_replicas + pipeline.teacher_replicas
    try:
        options, ready, watched = _serve(pipeline, engines)
        argv = _dict_to_argv(pipeline.rank_options | options)
        teachers = [ref for ref, engine in zip(watched, engines, strict=True) if engine.group.name == 'teacher']
        refs = [rank.run.remote(enter, argv, os.getcwd(), __version__, ready, teachers) for rank in group.workers]
        names = {ref: f'Rank {rank} on {place}' for rank, (ref, place) in enumerate(zip(refs, pipeline.places, strict=True))}
        names |= {ref: f'The {engine.name}' for ref, engine in zip(ready + watched, engines + engines, strict=True)}
        _wait(refs, names, teachers)
    except BaseException:
        group.shutdown()  # before the engines: what the ranks would say of their end is of no use
        raise
    # They leave by themselves: what is killed closes no logger.
    ray.wait([rank.__ray_terminate__.remote() for rank in group.workers], num_returns=len(refs), timeout=EXIT_SECONDS)
    return ray.get(refs[-1])


def _serve(pipeline: Any, engines: Sequence[Placed]) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Have the engines start.

    Returns:
        The options by which the ranks find them; for each engine a reference that is there when it answers, and one that fails when it
        ends.
    """
    opened = [engine.actor.open.remote(os.getcwd(), __version__) for engine in engines]
    _wait(opened, {ref: f'The {engine.name}' for ref, engine in zip(opened, engines, strict=True)})
    logs = os.path.join(os.getcwd(), pipeline.rank_options.get('output_dir') or 'megatron_output', 'engines')
    stamp = time.strftime('%Y%m%d-%H%M%S')
    ready, watched, options = [], [], {}
    for engine, (host, port, group_port) in zip(engines, ray.get(opened), strict=True):
        log, name = os.path.join(logs, f'{stamp}-{engine.group.name}-{engine.number}.log'), engine.group.name
        url = f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'
        argv = _dict_to_argv(engine.group.options | {'host': host, 'port': port})
        ready.append(engine.actor.serve.remote(engine.group.command, argv, url, log))
        watched.append(engine.actor.watch.remote())
        what = f'{engine.group.options["model"]} on GPU {engine.devices}'
        logger.info(f'The {engine.name}: {what}, will answer at {url}; its output is in {log} there.')
        if name == 'rollout':
            for option, value in (('vllm_server_base_url', url), ('vllm_server_group_port', group_port)):
                options.setdefault(option, []).append(value)
        else:
            options['teacher_model_server'] = ','.join(filter(None, [options.get('teacher_model_server'), url]))
    return options, ready, watched


@contextmanager
def _said_if_it_takes_long() -> Iterator[None]:
    """Ray waits for GPUs that are in use, and says nothing."""
    line = 'The GPUs that the file asks for are in use, or no node has enough of them left; waiting for them (`ray status` tells).'
    timer = threading.Timer(PATIENCE_SECONDS, logger.warning, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_nodes(pipeline: Any) -> None:
    """Ray would wait for nodes that never come, and say nothing.

    Raises:
        OptionError: The cluster's nodes do not have what is asked for, whoever uses it at the moment.
    """
    nnodes = max(pipeline.ray_config.nnodes, 1)
    together = {name: tuple(sorted(group)) for group in pipeline.colocate_groups for name in group}
    pools = {together.get(name, (name,)) for name, gpus in pipeline.group_gpus.items() if gpus}
    # Each pool has a placement group for each of its nodes: for every GPU as many CPUs as groups share it, all of them on one node.
    wanted = sorted(((per_node(pipeline, names[0]), len(names)) for names in pools), reverse=True)
    nodes = [[int(node['Resources'].get('GPU', 0)), int(node['Resources'].get('CPU', 0))] for node in ray.nodes() if node['Alive']]
    left = [list(node) for node in nodes]
    for gpus, roles in wanted:
        for _ in range(nnodes):
            place = next((node for node in left if node[0] >= gpus and node[1] >= gpus * roles), None)
            if place is None:
                asked = ', '.join(f'{name}.gpus {count}' for name, count in pipeline.group_gpus.items() if count)
                each = ', '.join(f'{nnodes} x {gpus} GPUs with {gpus * roles} CPUs' for gpus, roles in wanted)
                there = ', '.join(f'{gpu} GPUs with {cpu} CPUs' for gpu, cpu in nodes)
                raise OptionError(
                    f'{asked} on nnodes {nnodes}: needs {each}, each of them on one node, and the nodes of the Ray cluster have {there}; '
                    'start more nodes (`ray start`) or ask for less.'
                )
            place[0], place[1] = place[0] - gpus, place[1] - gpus * roles


def _wait(refs: Sequence[Any], names: Mapping[Any, str], teachers: Sequence[Any] = ()) -> None:
    """Return when all ranks have ended well.

    Args:
        refs: Of the ranks.
        names: What they and everything else that may fail meanwhile is, and where.
        teachers: Those of ``names`` after which the ranks end by themselves.

    Raises:
        OptionError: One that a rank or an engine has found.
        RayError: A rank or an engine has failed or died.
    """
    waiting, errors, without = list(names), [], []
    while not errors and not set(refs).isdisjoint(waiting):
        done, waiting = ray.wait(waiting)
        for ref, error in _errors(done):
            if ref in teachers:
                logger.error(f'{names[ref]} has ended; the ranks write a checkpoint and end.')
            (without if ref in teachers else errors).append((ref, error))
    if not errors:
        return
    if waiting and not without:
        errors += _errors(ray.wait(waiting, num_returns=len(waiting), timeout=OTHERS_SECONDS)[0])
    ref, error = min(without or errors, key=lambda found: _likely_effect(found[1]))
    logger.error(f'{names[ref]} has failed; everything else is ended.')
    if f"No module named '{PACKAGE}'" in str(error):
        place = names[ref].rpartition(' ')[2]
        raise OptionError(f'--use_ray: swift-gkd-plugin is not installed on {place}; install it on every node.') from None
    if _is_ours(error):
        raise error.cause from None  # its line is enough
    raise error


def _errors(done: Sequence[Any]) -> list[tuple[Any, RayError]]:
    """What has failed, and with what."""
    errors = []
    for ref in done:
        try:
            ray.get(ref)
        except RayError as error:
            errors.append((ref, error))
    return errors


def _is_ours(error: RayError) -> bool:
    return isinstance(error, RayTaskError) and type(error.cause).__module__.startswith(PACKAGE)


def _likely_effect(error: RayError) -> int:
    """How likely it is that another one's failure is the reason: those who waited for one that has died may be heard before."""
    return 0 if _is_ours(error) else 1 if isinstance(error, ActorDiedError) else 2
