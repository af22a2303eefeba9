"""The student answers through ms-swift's rollout: vLLM in the training processes (colocate), or on a server of ``swift rollout``.

ms-swift owns the engine, the weight sync, sleeping and multi-turn schedulers. Here is what it needs around it where only some samples
of a cycle are the student's: a rank may have none, and still takes part in every collective call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from accelerate.utils import gather_object
from swift.infer_engine import RequestConfig
from swift.rl_core.data import GKDSample
from swift.rlhf_trainers.rollout_mixin import RolloutTrainerMixin

from ..sources import STUDENT, engine_seed
from ..step.ahead import Ahead
from ..step.samples import Sample, check_one_each


class EngineRollout(RolloutTrainerMixin):
    """ms-swift's rollout for shares of any size. The trainer provides its ``conductor``."""

    # Of GRPO's trainer, but read for any server whose scheduler makes several samples of one (ms-swift 4.6.0, rollout_mixin.py:1309).
    dynamic_sample = False

    _turn = 0  # generation calls of this cycle so far; a multi-turn scheduler makes several
    _requested: list[GKDSample] | None = None  # of every rank: its share of what was asked for ahead

    @cached_property
    def _ahead(self) -> Ahead:
        """Of rank 0: what the server generates while a step trains."""
        return Ahead('rollout-ahead')

    def roll_out(self, samples: list[Sample]) -> None:
        """Every rank calls it, with its own share, which may be empty. What was requested ahead is collected."""
        self._turn = 0
        if self._requested is not None:
            requested, self._requested = self._requested, None
            generated = self._collected(requested)
        else:
            generated = self._fast_infer(self._requests(samples))
        check_one_each(len(generated), len(samples), self.args.multi_turn_scheduler)
        for sample, result in zip(samples, generated, strict=True):
            self.conductor.encoder.take(sample, result)

    def _requests(self, samples: list[Sample]) -> list[GKDSample]:
        return self._preprocess_inputs([self.conductor.encoder.inner(sample) for sample in samples])

    def forget_requests(self) -> None:
        """Of a training that ended while the server was generating."""
        self._requested = None
        if self._ahead:
            self._ahead.collected()

    def roll_out_ahead(self, samples: list[Sample]) -> None:
        """Have the server generate, from the weights of now, while the trainer goes on. A collective call."""
        if self._last_loaded_step != self.state.global_step:
            self._move_model_to_vllm(skip_async_check=True)
            self._last_loaded_step = self.state.global_step
        self._turn = 0
        self._requested = self._requests(samples)
        config = self._get_request_config()
        everyone = gather_object(self.samples2requests(self._requested))
        if self.accelerator.is_main_process:
            self._ahead.begin(super()._engine_infer, everyone, config)

    def _collected(self, requested: list[GKDSample]) -> list[GKDSample]:
        """What was requested ahead. ms-swift shares it out; it would also send the weights of now, from which nothing is sampled."""
        loaded, self._last_loaded_step = self._last_loaded_step, self.state.global_step
        try:
            return self._fast_infer(requested)
        finally:
            self._last_loaded_step = loaded

    def _engine_infer(self, infer_requests, request_config=None, **kwargs):
        if not self._ahead:
            with self.conductor.metrics.seconds('seconds/sampling'):
                return super()._engine_infer(infer_requests, request_config, **kwargs)
        found, seconds = self._ahead.collected()
        self.conductor.metrics.add_seconds('seconds/sampling', seconds)
        return found

    def _move_model_to_vllm(self, *args, **kwargs) -> None:
        with self.conductor.metrics.seconds('seconds/weight_sync'):
            super()._move_model_to_vllm(*args, **kwargs)

    def _get_request_config(self) -> RequestConfig:
        """The sampling options, with a seed of this cycle, turn and engine, to which the engine adds the number of the request."""
        config = copy.copy(self.request_config)
        config.temperature = self.conductor.answers.temperature(STUDENT)
        turn, self._turn = self._turn, self._turn + 1
        if self.vllm_mode == 'server' and self.vllm_use_async_engine:
            return config  # it would give every request the same seed, and equal prompts equal responses (vllm_engine.py:900)
        engine = 0 if self.vllm_mode == 'server' else self.accelerator.process_index // self.vllm_tensor_parallel_size
        config.seed = engine_seed(self.args.seed, self.conductor.cycle_key, turn, engine)
        return config

    def _add_prompt_id_to_inputs(self, samples: list[GKDSample]) -> list[GKDSample]:
        """Name the requests. ms-swift gathers all prompts to number equal ones, which GRPO needs; and skips the call on a rank without
        samples (4.6.0, rollout_mixin.py:1256), on which the others then wait forever."""
        for sample in samples:
            sample.prompt_id = sample.request_id = f'gkd-{self.accelerator.process_index}-{id(sample)}'
        return samples

    @contextmanager
    def multi_turn_completion_length_context(self) -> Iterator[None]:
        """``--completion_length_limit_scope total``: ms-swift marks its engine at the first request and removes the mark at the end
        (4.6.0, rollout_mixin.py:1619), also on a rank that had no request."""
        with super().multi_turn_completion_length_context():
            yield
            if self.vllm_mode == 'colocate' and self.completion_length_limit_scope == 'total':
                self.engine.set_grpo_max_model_len = True

    @contextmanager
    def offload_context(self) -> Iterator[None]:
        """The student and its optimizer away from the device while ms-swift's colocated engine generates."""
        model = self.accelerator.unwrap_model(self.model)
        optimizer = self.args.offload_optimizer and getattr(self, 'optimizer', None)
        if self.args.offload_model:
            self.offload_model(model)
        if optimizer:
            self.offload_optimizer()
        try:
            yield
        finally:
            if self.args.offload_model:
                self.load_model(model)
            if optimizer:
                self.load_optimizer()
