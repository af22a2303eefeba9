"""The real vLLM on a CPU beside megatron-core.

After each generation call the log-probabilities that the engine gave to the tokens that it sampled are compared with those of the live
student, on the very tensors that are trained; ``engine-rank<r>.jsonl`` has a line for each call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[1] / 'engine'))
import schedulers  # noqa: F401
import vllm_on_cpu  # noqa: F401

from swift_gkd_plugin.megatron.teachers import LiveStudent
from swift_gkd_plugin.megatron.views import local_view
from swift_gkd_plugin.step.samples import sampled_turns
from swift_gkd_plugin.teachers import TopKOptions


def largest_difference(trainer, samples) -> float:
    """max |vLLM's log-probability - the live student's| over the sampled tokens that this rank predicts; inf if one isn't trained."""
    if not samples:
        return 0.0
    batch = trainer.conductor.encoder.micro_batch(samples)
    columns = trainer.loss.options.vocab_size
    with trainer.gathered_weights():
        (signal,) = LiveStudent(trainer.args, trainer.unwrapped_models).signals([batch], TopKOptions(columns, 1.0, columns))
    if signal is None:  # before the last stage
        return 0.0
    sampled = torch.cat(
        [_placed(labels.tolist(), sample) for labels, sample in zip(batch.labels.split(batch.lengths), samples, strict=True)]
    )
    view = local_view(trainer.args, batch.student_inputs, batch.student_index)
    theirs, labels = view.of(sampled), view.of(batch.labels)
    ours = signal.logprobs[signal.ids == labels[:, None]]
    differences = (ours - theirs).abs()[~theirs.isnan()]
    return differences.max().item() if len(differences) else 0.0


def _placed(labels: list[int], sample) -> torch.Tensor:
    """vLLM's log-probability of each trained token; nan for those that the template has put behind a turn, inf if a turn isn't there."""
    found, start = torch.full((len(labels),), float('nan')), 0
    for ids, values in zip(sampled_turns(sample.generated), sample.generated.rollout_logprobs, strict=True):
        while labels[start : start + len(ids)] != ids:
            start += 1
            if start > len(labels):
                return torch.full_like(found, float('inf'))
        found[start : start + len(ids)] = torch.tensor(values)
        start += len(ids)
    return found


def install(trainer: type) -> None:
    answer, sync, start = trainer.roll_out, trainer._move_model_to_vllm, trainer._init_rollout_engine

    def watched(self, samples) -> None:
        answer(self, samples)
        line = {
            'step': self.state.iteration,
            'share': len(samples),
            'tokens': sum(len(sample.response.token_ids) for sample in samples),
            'error': largest_difference(self, samples),
        }
        with open(Path(self.args.output_dir, f'engine-rank{dist.get_rank()}.jsonl'), 'a') as file:
            file.write(json.dumps(line) + '\n')

    def synced(self) -> None:
        if 'without sync' not in Path(self.args.output_dir).name:
            sync(self)

    def started(self) -> None:
        # ms-swift gathers requests by accelerate, which without a GPU takes each rank for the only one.
        PartialState._reset_state()
        PartialState(cpu=True)
        start(self)

    trainer.roll_out, trainer._move_model_to_vllm, trainer._init_rollout_engine = watched, synced, started
