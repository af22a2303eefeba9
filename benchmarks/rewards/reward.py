"""``--external_plugins reward.py --reward_funcs exact``: 1 for an answer that is right as a whole, 0 for any other."""

from swift.rewards import ORM, orms


class Exact(ORM):
    def __call__(self, completions, solution, **kwargs):
        return [float(text.split() == right.split()) for text, right in zip(completions, solution, strict=True)]


orms['exact'] = Exact
