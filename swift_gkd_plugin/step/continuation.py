"""A response behind the prompt that was encoded before it was generated, so that images are prepared once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from swift.loss_scale import LossScale
from swift.rl_core.data import GKDSample
from swift.utils import get_logger

logger = get_logger()

IGNORED = -100  # label of a token that isn't trained, as everywhere in transformers


class Continuation:
    """What ``template.encode`` makes of a prompt and a response of token ids, made of the encoded prompt.

    Templates may put anything into what they return. So the first sample of each kind, by the names in there, is encoded as a whole too,
    and a kind of which the two differ is always encoded as a whole.

    Args:
        template: ms-swift's template, which has encoded the prompts.
    """

    def __init__(self, template):
        self.template = template
        self._agrees: dict[frozenset[str], bool] = {}

    def __call__(self, prompt: dict[str, Any] | None, inner: GKDSample, encode: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            prompt: Encoded for generation; None if it isn't at hand.
            inner: The sample with its response.
            encode: Encodes it as a whole.
        """
        if prompt is None or not self._is_plain(prompt, inner):
            return encode()
        found = self._continued(prompt, inner.response_token_ids)
        kind = frozenset(found)
        if kind not in self._agrees:
            whole = encode()
            self._agrees[kind] = _same(found, whole)
            if not self._agrees[kind]:
                logger.info(f'Prompts with {", ".join(sorted(kind))} are encoded again with their responses: the template adds to them.')
            return whole
        return found if self._agrees[kind] else encode()

    def _is_plain(self, prompt: dict[str, Any], inner: GKDSample) -> bool:
        """Whether nothing but the response is trained, each token of it alike, and the prompt was not cut."""
        turns, masks = inner.response_token_ids, inner.response_loss_mask
        one_turn = bool(turns) and (isinstance(turns[0], int) or (len(turns) == 1 and bool(turns[0])))
        first_answer = all(message['role'] != 'assistant' for message in inner.messages[:-1])
        scale, limit = self.template.loss_scale, self.template.max_length
        plain_scale = type(scale) is LossScale and scale.base_strategy != 'all'
        fits = limit is None or len(prompt['input_ids']) < limit
        return one_turn and first_answer and plain_scale and fits and all(map(all, masks or ()))

    @staticmethod
    def _continued(prompt: dict[str, Any], turns: list[int] | list[list[int]]) -> dict[str, Any]:
        ids = turns if isinstance(turns[0], int) else turns[0]
        before = len(prompt['input_ids'])
        found = {name: value for name, value in prompt.items() if name not in ('_extra_kwargs', 'labels', 'loss_scale')}
        found['input_ids'] = [*prompt['input_ids'], *ids]
        found['labels'] = [IGNORED] * before + list(ids)
        found['length'] = before + len(ids)
        found['lengths'] = [before + len(ids)]
        types = prompt.get('mm_token_type_ids')
        if types is not None:  # a response is text
            found['mm_token_type_ids'] = torch.cat([types, types.new_zeros(*types.shape[:-1], len(ids))], dim=-1)
        return found


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other)
