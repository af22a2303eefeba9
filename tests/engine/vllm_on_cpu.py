"""Makes ms-swift's rollout (colocated, and ``swift rollout``) run on vLLM for CPUs. For tests only.

ms-swift and vLLM expect a GPU in the places below; the line numbers are those of ms-swift 4.6.0 and vLLM 0.32.0. What is under test,
the requests, the weight sync, sleeping, LoRA and multi-turn, is theirs and ours and stays as it is.

It belongs into every process that holds an engine or talks to one. The trainers import it before anything else, a server gets it by
``--external_plugins``, and processes that vLLM starts itself find it as a plugin of vLLM, by its dist-info in this directory, with this
directory in PYTHONPATH and vllm_on_cpu in VLLM_PLUGINS.
"""

from __future__ import annotations

import contextlib
import multiprocessing

import torch
import torch.nn.functional as F
from swift.arguments import RolloutArguments
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.layers import utils as layers


def _device_module() -> None:
    # swift/utils: get_torch_device() is the module torch.cpu, which is asked for more than it has when an engine goes to sleep
    # (swift/rlhf_trainers/utils.py:267) and when weights are sent (swift/rlhf_trainers/vllm_client.py:66).
    torch.cpu.memory_reserved = torch.cpu.memory_allocated = lambda: 0
    torch.cpu.empty_cache = lambda: None
    torch.cpu.device = lambda device: contextlib.nullcontext()
    # swift/utils/torch_utils.py:73: synchronize() takes CUDA for granted.
    torch.cuda.synchronize = lambda device=None: None


def _weights_that_can_be_loaded_again() -> None:
    # vllm/model_executor/layers/linear.py:216 packs the weights of linear layers for oneDNN and drops the parameters, so that
    # load_weights() finds no weight_loader. The plain product keeps them.
    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = F.linear

    layers.dispatch_cpu_unquantized_gemm = plain


def _sleep() -> None:
    # vllm/config/model.py:656 refuses the flag on a CPU. The engine's sleep() and wake_up() are there and free nothing.
    create = EngineArgs.create_model_config

    def create_model_config(self, *args, **kwargs):
        self.enable_sleep_mode = False
        return create(self, *args, **kwargs)

    EngineArgs.create_model_config = create_model_config


def _lora_tensors_of_its_own() -> None:
    # swift/rlhf_trainers/rollout_mixin.py:706 hands over lora_B itself; vllm/lora/lora_model.py:173 copies it to the engine's device,
    # which is no copy here, and vllm/lora/lora_weights.py:41 then scales the trainer's parameter in place.
    make = LoRAModel.from_lora_tensors.__func__

    def from_lora_tensors(cls, lora_model_id, tensors, *args, **kwargs):
        return make(cls, lora_model_id, {name: tensor.clone() for name, tensor in tensors.items()}, *args, **kwargs)

    LoRAModel.from_lora_tensors = classmethod(from_lora_tensors)


def _weights_over_the_store() -> None:
    # Weights go to a server by NCCL (swift/rlhf_trainers/vllm_client.py:257, swift/pipelines/infer/rollout.py:163). Here they go
    # through the key-value store that both sides have for setting NCCL up.
    def __init__(self, group, device=None, library_path=None):
        self.group, self.rank, self.world_size, self.available, self.disabled = group, group.rank, group.world_size, True, False

    def broadcast(self, tensor, src, stream=None):
        received = self.group.broadcast(tensor.detach().contiguous() if self.rank == src else None, src)
        if self.rank != src:
            tensor.copy_(received)

    # Of the class: ms-swift's client is made from the command line before --external_plugins are imported.
    PyNcclCommunicator.device = torch.device('cpu')
    PyNcclCommunicator.__init__, PyNcclCommunicator.broadcast = __init__, broadcast

    # The store is opened on all interfaces (swift/rlhf_trainers/vllm_client.py:238); a test stays on the loopback.
    create = StatelessProcessGroup.create

    def on_loopback(host, *args, **kwargs):
        return create('127.0.0.1' if host == '0.0.0.0' else host, *args, **kwargs)

    StatelessProcessGroup.create = staticmethod(on_loopback)


def _no_devices_needed() -> None:
    RolloutArguments._check_device_count = lambda self: None  # swift/arguments/deploy_args.py:142


def _worker_in_a_fork() -> None:
    # ms-swift spawns the worker of `swift rollout` unless told otherwise (swift/pipelines/infer/rollout.py:573), because of CUDA. A fork
    # has imported everything, which is half of the time that a server needs to start.
    if multiprocessing.get_start_method(allow_none=True) is None:
        multiprocessing.set_start_method('fork')


def register() -> None:
    """For vLLM's plugin loader, which calls something after importing this module."""


_device_module()
_weights_that_can_be_loaded_again()
_sleep()
_lora_tensors_of_its_own()
_weights_over_the_store()
_no_devices_needed()
_worker_in_a_fork()
