"""Reward functions of the tests, in a file as users give it with --external_plugins.

They are made of token ids, for tiny models write nothing that means anything. ``ids`` notes the responses beside what its run
writes; a run of grpo is given those of the run ``gkd`` next to it, so that both learn from the same ones.
"""

import json
from collections import Counter
from pathlib import Path

from swift.rewards import ORM, AsyncORM, orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer

from swift_gkd_plugin.feedback import feedbacks

NOTED = 'responses.jsonl'


def flat(ids):
    return [token for turn in ids for token in turn] if ids and isinstance(ids[0], list) else ids


class Ids(ORM):
    """Any number, of the ids."""

    def __call__(self, completions, response_token_ids, messages, finish_reason, **kwargs):
        with Path(self.args.output_dir, NOTED).open('a') as file:
            for text, ids, asked, reason in zip(completions, response_token_ids, messages, finish_reason, strict=True):
                file.write(json.dumps([asked[0]['content'], text, flat(ids), reason]) + '\n')
        return [sum(flat(ids)) % 11 / 10 for ids in response_token_ids]


class Short(AsyncORM):
    """The dataset says how much it counts."""

    async def __call__(self, completions, response_token_ids, worth, **kwargs):
        return [one / len(flat(ids)) for ids, one in zip(response_token_ids, worth, strict=True)]


class Broken(ORM):
    """From the second step on."""

    def __call__(self, completions, trainer_state, **kwargs):
        step = getattr(trainer_state, 'global_step', None)
        if (trainer_state.iteration if step is None else step) > 0:
            raise ValueError('no judge is there')
        return [float(len(completion) % 3) for completion in completions]


orms.update(ids=Ids, short=Short, broken=Broken)


def hint(response, messages, **columns):
    """The same about every response."""
    return f'think of the numbers , then : {messages[-1]["content"]}'


feedbacks['hint'] = hint


def given(self, samples):
    """The responses that another run has noted, in place of the student's."""
    lines = [json.loads(line) for line in Path(self.args.output_dir).with_name('gkd').joinpath(NOTED).read_text().splitlines()]
    taken = Counter()
    for sample in self._preprocess_inputs(samples):
        question = sample.messages[0]['content']
        of_question = [line for line in lines if line[0] == question]
        _, text, sample.response_token_ids, sample.finish_reason = of_question[taken[question]]
        taken[question] += 1
        sample.messages.append({'role': 'assistant', 'content': text})
        sample.add_eos = False
    return samples


GRPOTrainer._generate_completions = given
