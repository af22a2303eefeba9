"""megatron-core and its bridge on CPU and gloo, for tests: ``torch.cuda`` that means the CPU, and the few things that need a real GPU.

What is computed stays megatron-core's: layers, schedules, optimizers and every collective run as they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import types

# megatron-core compiles its fused functions; here compilation would take longer than the tests.
os.environ.setdefault('TORCHDYNAMO_DISABLE', '1')
os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')

import torch

CPU = torch.device('cpu')
FACTORIES = [
    'arange',
    'as_tensor',
    'asarray',
    'empty',
    'empty_like',
    'empty_strided',
    'eye',
    'full',
    'full_like',
    'linspace',
    'logspace',
    'ones',
    'ones_like',
    'rand',
    'rand_like',
    'randint',
    'randn',
    'randn_like',
    'randperm',
    'tensor',
    'tril_indices',
    'triu_indices',
    'zeros',
    'zeros_like',
]
METHOD_FACTORIES = ['new_empty', 'new_full', 'new_ones', 'new_tensor', 'new_zeros']


def without_gpu(device):
    """The device that stands for ``device`` here. True and False are flags of ``Tensor.to``, not numbers of a GPU."""
    if isinstance(device, bool) or device is None:
        return device
    if isinstance(device, int) or (isinstance(device, str) and device.startswith('cuda')):
        return CPU
    return CPU if isinstance(device, torch.device) and device.type == 'cuda' else device


def on_cpu(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        kwargs.pop('pin_memory', None)
        if 'device' in kwargs:
            kwargs['device'] = without_gpu(kwargs['device'])
        return function(*args, **kwargs)

    return wrapped


def moved_to_cpu(to):
    @functools.wraps(to)
    def wrapped(self, *args, **kwargs):
        if 'device' in kwargs:
            kwargs['device'] = without_gpu(kwargs['device'])
        if args and not isinstance(args[0], torch.dtype | torch.Tensor):
            args = (without_gpu(args[0]), *args[1:])
        return to(self, *args, **kwargs)

    return wrapped


def replace_tensor_factories() -> None:
    from torch.utils._device import _device_constructors

    _device_constructors()  # `with torch.device('meta')` knows the factories by identity, and remembers them at its first use
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    for name in METHOD_FACTORIES:
        setattr(torch.Tensor, name, on_cpu(getattr(torch.Tensor, name)))
    torch.Tensor.to = moved_to_cpu(torch.Tensor.to)
    torch.nn.Module.to = moved_to_cpu(torch.nn.Module.to)
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.cuda.cudart = lambda: types.SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    load = torch.load
    torch.load = lambda *args, **kwargs: load(
        *args, **{**kwargs, 'map_location': without_gpu(kwargs['map_location'])} if 'map_location' in kwargs else kwargs
    )
    kind = torch.Tensor.type

    def cuda_names(self, *args, **kwargs):
        # megatron-core's optimizers sort parameters by these names and refuse others.
        name = kind(self, *args, **kwargs)
        known = ('torch.FloatTensor', 'torch.HalfTensor', 'torch.BFloat16Tensor')
        return name.replace('torch.', 'torch.cuda.') if isinstance(name, str) and name in known else name

    torch.Tensor.type = cuda_names
    torch.jit._state.disable()  # TorchScript can't compile the wrapped factories


class Nothing:
    """A stream or an event: everything is done at once."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def replace_cuda() -> None:
    cuda = torch.cuda

    def returns(value):
        return lambda *args, **kwargs: value

    answers = {
        'current_device': CPU,
        'get_device_capability': (9, 0),
        'get_device_name': 'cpu',
        'is_current_stream_capturing': False,
        'mem_get_info': (2**34, 2**34),
        **dict.fromkeys(('memory_allocated', 'max_memory_allocated', 'memory_reserved', 'max_memory_reserved'), 0),
        **dict.fromkeys(('set_device', 'synchronize', 'empty_cache', 'ipc_collect', 'reset_peak_memory_stats', 'set_stream')),
        **dict.fromkeys(('current_stream', 'default_stream'), Nothing()),
    }
    for name, value in answers.items():
        setattr(cuda, name, returns(value))
    cuda.Stream = cuda.Event = Nothing
    cuda.stream = lambda stream=None: contextlib.nullcontext(stream)
    for name in ('range_push', 'range_pop', 'mark'):
        setattr(cuda.nvtx, name, returns(0))
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = returns(None)
    for owner in (cuda, cuda.random):
        owner.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        owner.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


@contextlib.contextmanager
def triton_while_importing():
    """One file of the bridge imports triton without asking; it is not installed next to a CPU torch, and its kernels don't run here."""
    if importlib.util.find_spec('triton') is not None:
        yield
        return
    triton, language = types.ModuleType('triton'), types.ModuleType('triton.language')
    language.__getattr__ = lambda name: object
    triton.jit = lambda function=None, **kwargs: function or (lambda f: f)
    triton.cdiv = lambda a, b: -(-a // b)
    triton.language = language
    sys.modules |= {'triton': triton, 'triton.language': language}
    try:
        yield
    finally:
        del sys.modules['triton'], sys.modules['triton.language']


def keep_what_is_sent() -> None:
    """The interleaved schedule empties a tensor (``out.data = …``) while it is still being sent, which streams make safe on a GPU. Gloo
    reads the memory when it gets to it: here it gets a tensor object of its own that holds on to it."""
    from torch.distributed import distributed_c10d

    isend = distributed_c10d.isend

    @functools.wraps(isend)
    def of_detached(tensor, *args, **kwargs):
        return isend(tensor.detach(), *args, **kwargs)

    torch.distributed.isend = distributed_c10d.isend = of_detached


def exchange_unequal_parts() -> None:
    """Ranks that hold parts of the same experts exchange different numbers of tokens, which NCCL does and gloo does not."""
    from torch.distributed import distributed_c10d as dist

    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    def parts_of_all(parts, group):
        return zip(dist.get_process_group_ranks(group or dist.group.WORLD), parts, strict=True)

    @functools.wraps(all_gather)
    def gathered(parts, mine, group=None, **kwargs):
        if len({part.shape for part in parts}) == 1:
            return all_gather(parts, mine, group=group, **kwargs)
        for rank, part in parts_of_all(parts, group):
            if rank == dist.get_rank():
                part.copy_(mine)
            if part.numel():
                dist.broadcast(part, rank, group=group)

    @functools.wraps(reduce_scatter)
    def reduced(mine, parts, *args, group=None, **kwargs):
        if len({part.shape for part in parts}) == 1:
            return reduce_scatter(mine, parts, *args, group=group, **kwargs)
        for rank, part in parts_of_all(parts, group):
            total = part.clone()
            if total.numel():
                dist.all_reduce(total, group=group)
            if rank == dist.get_rank():
                mine.copy_(total)

    torch.distributed.all_gather = dist.all_gather = gathered
    torch.distributed.reduce_scatter = dist.reduce_scatter = reduced


def adjust_megatron() -> None:
    from megatron.core.tensor_parallel import random

    # Its generators of random numbers are the CUDA ones; here the states are those of the CPU's.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def as_python(tensor, as_numpy=False, record_stream=False):
        # The splits of an all-to-all become numbers of Python only on their way from a GPU.
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = as_python

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # With fp32 parameters it loads a checkpoint by writing into leaves that require a gradient (mcore 0.16.1).
    load = DistributedOptimizer._set_main_param_and_optimizer_states
    DistributedOptimizer._set_main_param_and_optimizer_states = torch.no_grad()(load)

    with triton_while_importing():
        import mcore_bridge
        import mcore_bridge.model
    from mcore_bridge.utils import megatron_utils
    from megatron.core import mpu, tensor_parallel

    seeds = megatron_utils.set_random_seed

    def set_random_seed(seed, data_parallel_random_init=False, *args, **kwargs):
        # The original leaves megatron's tracker without states where there is no GPU.
        seeds(seed, data_parallel_random_init, *args, **kwargs)
        seed += 1009 * mpu.get_pipeline_model_parallel_rank()
        if data_parallel_random_init:
            seed += 11 * mpu.get_data_parallel_rank()
        tensor_parallel.model_parallel_cuda_manual_seed(seed, False)

    for module in (mcore_bridge, mcore_bridge.utils, megatron_utils):
        module.set_random_seed = set_random_seed


def install() -> None:
    if torch.cuda.is_available() or 'transformer_engine' in sys.modules:
        return
    replace_tensor_factories()
    replace_cuda()
    keep_what_is_sent()
    exchange_unequal_parts()
    import cpu_transformer_engine

    cpu_transformer_engine.install()
    adjust_megatron()
