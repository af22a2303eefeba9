"""A reward function: answers that come to an end, the shorter the better.

A function gets the answers, every column of the dataset by its name, and what ms-swift adds (docs_en/rewards.md, docs_zh/rewards.md).
"""

from swift.rewards import ORM, orms


class Concise(ORM):
    def __call__(self, completions, finish_reason, response_token_ids, **kwargs):
        ended = [reason == 'stop' for reason in finish_reason]
        return [1 / (1 + len(ids) / 100) if end else 0.0 for end, ids in zip(ended, response_token_ids, strict=True)]


orms['concise'] = Concise
