"""The student answers through ms-swift's rollout for Megatron: vLLM in the training processes, or on a server of ``swift rollout``.

As ``hf/engine.py``, with this back end's shares: ranks with the same rows share their prompts out, any number of them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch.distributed as dist
from swift.infer_engine import RequestConfig
from swift.megatron.trainers.rollout_mixin import MegatronRolloutMixin
from swift.megatron.utils import disable_forward_pre_hook, enable_forward_pre_hook
from swift.rl_core.data import GKDSample

from ..sources import STUDENT, engine_seed
from ..step.ahead import Ahead
from ..step.samples import Sample, check_one_each
from ..world import exchange_objects
from .exchange import numbers_of_all


class EngineRollout(MegatronRolloutMixin):
    """ms-swift's rollout for shares of any size. The trainer provides its ``conductor``."""

    _turn = 0  # generation calls of this cycle so far; a multi-turn scheduler makes several
    _requested: list[GKDSample] | None = None  # this rank's share of what the server was asked for ahead

    @cached_property
    def _ahead(self) -> Ahead:
        """Of the last rank: what the server generates while a step trains."""
        return Ahead('rollout-ahead')

    def _init_rollout_engine(self) -> None:
        # ms-swift makes none at --lmbda 0 (4.6.0, megatron/trainers/rollout_mixin.py:389), even if evaluations ask it.
        lmbda = self.args.lmbda
        if self.args.gkd_eval_source == STUDENT:
            self.args.lmbda = 1
        try:
            super()._init_rollout_engine()
        finally:
            self.args.lmbda = lmbda

    def roll_out(self, samples: list[Sample]) -> None:
        """Every rank calls it, even with nothing to generate. What was requested ahead is collected."""
        self._turn = 0
        if self._requested is not None:
            mine = self._collected()
        else:
            with self.gathered_weights():
                mine = self._generate_completions(self._share(samples))
        shares = self.conductor.ranks.among_sharers(mine)
        for number, sample in enumerate(samples):
            result = shares[number % len(shares)][number // len(shares)]
            self.conductor.encoder.take(sample, result)

    def _share(self, samples: list[Sample]) -> list[GKDSample]:
        """What this rank asks the engine, of the samples that it has in common with others."""
        group = self.conductor.ranks.sharing
        return [self.conductor.encoder.inner(sample) for sample in samples[dist.get_rank(group) :: dist.get_world_size(group)]]

    def roll_out_ahead(self, samples: list[Sample]) -> None:
        """Have the server generate, from the weights of now, while the trainer goes on. A collective call."""
        if self._last_loaded_step != self._step:
            with self.gathered_weights():
                self._move_model_to_vllm()
            self._last_loaded_step = self._step
        self._turn = 0
        self._requested = self._preprocess_inputs(self._share(samples))
        world = dist.get_world_size()
        self._shares = numbers_of_all(len(self._requested))
        # To the last rank, which is the main process.
        outgoing = [*[None] * (world - 1), self.samples2requests(self._requested)]
        everyone = exchange_objects(outgoing, self.args.device)
        if self.is_main_process:
            requests, config = list(itertools.chain.from_iterable(everyone)), self._get_request_config()
            self._ahead.begin(self.vllm_client.infer, infer_requests=requests, request_config=config)

    def _collected(self) -> list[GKDSample]:
        """This rank's share of what was requested ahead. A collective call.

        Raises:
            OptionError: The scheduler of the server has made another number of samples.
        """
        requested, self._requested = self._requested, None
        found = [None]
        if self.is_main_process:
            found[0], seconds = self._ahead.collected()
            self.conductor.metrics.add_seconds('seconds/sampling', seconds)
        dist.broadcast_object_list(found, src=dist.get_world_size() - 1)
        check_one_each(len(found[0]), sum(self._shares), None)
        first = sum(self._shares[: dist.get_rank()])
        return self._postprocess_rollout_outputs(requested, found[0][first : first + len(requested)])

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """With --overlap_param_gather a rank has the new weights of the others only when a forward pass has asked for them, too late for
        an engine that gets them now. ms-swift does the same around evaluations and checkpoints."""
        # Where it saves, ms-swift takes the hooks off without a note (4.6.0, megatron/trainers/base.py:776).
        if not self._pre_hook_enabled or not all(model.remove_forward_pre_hook_handles for model in self.wrapped_models):
            yield
            return
        disable_forward_pre_hook(self.wrapped_models)
        try:
            yield
        finally:
            enable_forward_pre_hook(self.wrapped_models)

    def _move_model_to_vllm(self) -> None:
        with self.conductor.metrics.seconds('seconds/weight_sync'):
            super()._move_model_to_vllm()

    def _rollout(self, samples: list[GKDSample]) -> list[Any]:
        with self.conductor.metrics.seconds('seconds/sampling'):
            return super()._rollout(samples)

    def _rollout_requests(self, requests: list[Any], request_config: RequestConfig) -> list[Any]:
        # One turn of a conversation; ms-swift gives all of them the seed of the first.
        config, self._turn = self._get_request_config(), self._turn + 1
        with self.conductor.metrics.seconds('seconds/sampling'):
            return super()._rollout_requests(requests, config)

    def _get_request_config(self) -> RequestConfig:
        """The engine's sampling options with a seed of this cycle, turn and engine; ms-swift adds the request's number to it."""
        config = copy.copy(self.request_config)
        config.temperature = self.conductor.answers.temperature(STUDENT)
        engine = 0 if self.vllm_mode == 'server' else self.process_index // self.vllm_tensor_parallel_size
        config.seed = engine_seed(self.args.seed, self.conductor.cycle_key, self._turn, engine)
        return config
