"""How large the gradients of rewards and divergence are beside each other, where both reach the student: at its hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

# Of a micro-batch, looked at for this: two more passes through the output head for them cost a hundredth of a step.
TOKENS = 64
# Arguments of the operators with a row for each token; the first of all, hidden states or ready logits, is another.
PER_TOKEN = (
    *('teacher_hidden', 'teacher_logits', 'topk_logprobs', 'topk_ids', 'tail_logprobs', 'teacher_logprobs'),
    *('token_weights', 'labels', 'label_weights', 'label_temperature'),
)
OF_STUDENT = ('student_weight', 'student_bias')


def gradient_norms(operator: Callable[..., torch.Tensor], rewards: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """[2] squared norms, of the rewards' gradient and of the divergence's, over up to ``TOKENS`` tokens that have a reward.

    Args:
        operator: Of :mod:`..divergence`, with reduction ``sum``.
        rewards: [n], the part of ``label_weights`` that is the rewards'.
        args, kwargs: The operator's, ``token_weights``, ``labels`` and ``label_weights`` among them.
    """
    given = dict(inspect.signature(operator).bind(*args, **kwargs).arguments)
    states_name, states = next(iter(given.items()))
    chosen = rewards.nonzero()[:, 0]
    if not len(chosen):
        return states.new_zeros(2, dtype=torch.float32)
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(TOKENS, len(chosen)), device=chosen.device).long()]
    given |= {name: given[name][chosen] for name in PER_TOKEN if isinstance(given.get(name), torch.Tensor)}
    given |= {name: given[name].detach() for name in OF_STUDENT if given.get(name) is not None}
    if given.get('student_lora') is not None:
        a, b, scaling = given['student_lora']
        given['student_lora'] = a.detach(), b.detach(), scaling
    if given.get('reference') is not None:
        given['reference'] = replace(given['reference'], hidden=given['reference'].hidden[chosen])
    clipping, rewards = given.get('clipping'), rewards[chosen]
    if clipping is not None:
        ratios = None if clipping.log_ratios is None else clipping.log_ratios[chosen]
        given['clipping'] = replace(clipping, old_logprobs=clipping.old_logprobs[chosen], log_ratios=ratios)
    given['stats'] = None
    norms = []
    for token_weights, label_weights in (
        (torch.zeros_like(given['token_weights']), rewards),
        (given['token_weights'], given['label_weights'] - rewards),
    ):
        x = states[chosen].detach().requires_grad_()
        with torch.enable_grad():
            loss = operator(**{**given, states_name: x, 'token_weights': token_weights, 'label_weights': label_weights})
        norms.append(torch.autograd.grad(loss, x)[0].float().square().sum())
    return torch.stack(norms)
