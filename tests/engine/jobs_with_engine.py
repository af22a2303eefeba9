"""``hf/jobs.py`` with vLLM: ``python jobs_with_engine.py jobs.json``, alone or by the ranks of fork_server.py.

After each generation call the log-probabilities that the engine gave to the tokens it sampled are compared with those of the live
student, on the very tensors that are trained; ``engine-rank<r>.jsonl`` has a line for each call.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import schedulers  # noqa: F401
import torch
import vllm_on_cpu  # noqa: F401
from swift.callbacks import callbacks_map
from transformers import TrainerCallback

from swift_gkd_plugin import register

register()

from swift_gkd_plugin.hf.engine import EngineRollout  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / 'hf'))
import jobs  # noqa: E402


@torch.no_grad()
def largest_difference(trainer, samples) -> float:
    """max |vLLM's log-probability - the live student's| over the trained tokens; inf if they are not those that were sampled."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    modes = [module.training for module in model.modules()]
    model.eval()
    worst = 0.0
    for sample in samples:
        encoded = dict(trainer.conductor.encoder.views(sample)[0])  # a collator takes the images out
        labels = torch.tensor(encoded['labels'])
        trained = (labels != -100).nonzero()[:, 0]
        turns = trained.tensor_split((trained.diff() > 1).nonzero()[:, 0] + 1)
        encoded.pop('loss_scale', None)
        inputs = trainer.template.data_collator([encoded])
        del inputs['labels']
        logprobs = model(**inputs).logits[0].float().log_softmax(-1)
        for positions, theirs in zip(turns, sample.generated.rollout_logprobs, strict=True):
            if len(positions) < len(theirs):
                return float('inf')
            positions = positions[: len(theirs)]  # behind a turn that another one follows the template's end of turn is trained too
            ours = logprobs[positions - 1, labels[positions]]
            worst = max([worst, *(ours - torch.tensor(theirs)).abs().tolist()])
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    return worst


answer = EngineRollout.roll_out


def watched(self, samples) -> None:
    answer(self, samples)
    line = {
        'step': self.state.global_step,
        'share': len(samples),
        'tokens': sum(len(sample.response.token_ids) for sample in samples),
        'turns': [len(sample.generated.rollout_logprobs) for sample in samples],
        'roles': [[message['role'] for message in sample.generated.messages] for sample in samples],
        'error': largest_difference(self, samples),
    }
    with open(Path(self.args.output_dir, f'engine-rank{self.args.process_index}.jsonl'), 'a') as file:
        file.write(json.dumps(line) + '\n')


EngineRollout.roll_out = watched


class WithoutSync(TrainerCallback):
    """The engine keeps the weights that training started from."""

    def __init__(self, args, trainer):
        super().__init__()
        move = trainer._move_model_to_vllm
        trainer._move_model_to_vllm = lambda *args, **kwargs: None if trainer.state.global_step else move(*args, **kwargs)


callbacks_map['without_sync'] = WithoutSync

if __name__ == '__main__':
    jobs.main(sys.argv[1])
