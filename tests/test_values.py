"""Combinations of options that cannot be, by the command line alone: rewards, and what is known of the teacher."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from swift_gkd_plugin.arguments import GKDOptions, OptionError, check_values


@dataclasses.dataclass
class Arguments(GKDOptions):
    """Of ms-swift's those that are asked for."""

    lmbda: float = 1.0
    beta: float = 0.5
    temperature: float = 0.9
    sft_alpha: float = 0.0
    max_completion_length: int = 512
    truncation_strategy: str = 'delete'
    seq_kd: bool = False
    use_vllm: bool = False
    vllm_mode: str = 'colocate'
    multi_turn_scheduler: Any = None
    gkd_logits_topk: Any = None
    teacher_model: Any = 'some/model'
    teacher_adapters: list = dataclasses.field(default_factory=list)
    teacher_model_server: Any = None
    offload_teacher_model: bool = False
    reward_funcs: list = dataclasses.field(default_factory=list)
    reward_model: Any = None
    reward_weights: Any = None
    epsilon: float = 0.2
    epsilon_high: Any = None
    delta: Any = None
    importance_sampling_level: str = 'token'


REWARDED = {'reward_funcs': ['format'], 'gkd_num_samples': 4}
SAMPLED = {'gkd_signal': 'sampled', 'gkd_divergence': 'reverse_kl'}
SERVER = {'teacher_model': None, 'teacher_model_server': 'http://127.0.0.1:9'}


@pytest.mark.parametrize(
    ('given', 'parts'),
    [
        ({**REWARDED, 'gkd_rl_weight': -1.0}, ['--gkd_rl_weight -1.0', '>= 0']),
        ({**REWARDED, 'gkd_num_samples': 1}, ['--gkd_num_samples 1', '2 or more']),
        ({**REWARDED, 'temperature': 0.0, 'gkd_temperature': 1.0}, ['--temperature 0.0', 'would be the same']),
        ({**REWARDED, 'lmbda': 0.0}, ['--lmbda 0', '--gkd_eval_source student']),
        ({**REWARDED, 'gkd_routing': 'teacher'}, ['--gkd_routing teacher', 'leave one of them out']),
        ({**REWARDED, 'gkd_loss_weight': 0.0, 'lmbda': 0.5}, ['--gkd_loss_weight 0', '--lmbda 0.5', 'set --lmbda 1']),
        (
            {**REWARDED, 'gkd_loss_weight': 0.0, 'gkd_rl_weight': 0.0},
            ['--gkd_loss_weight 0.0', '--gkd_rl_weight 0.0', 'the loss would be 0'],
        ),
        ({**REWARDED, 'gkd_rl_schedule': 'switch', 'gkd_loss_weight': 0.0}, ['--gkd_rl_schedule switch', 'both must be > 0']),
        ({**REWARDED, 'gkd_rl_switch': 1.0}, ['--gkd_rl_switch 1.0', '(0, 1)']),
        ({'gkd_rl_weight': float('inf')}, ['--gkd_rl_weight inf', 'finite']),
        ({'gkd_loss_weight': float('inf')}, ['--gkd_loss_weight inf', 'finite']),
        ({'sft_alpha': float('nan')}, ['--sft_alpha nan', 'finite']),
        ({**REWARDED, 'reward_weights': [1.0, float('nan')]}, ['--reward_weights 1.0 nan', 'finite']),
        ({**REWARDED, 'gkd_passing_reward': float('nan')}, ['--gkd_passing_reward nan', 'finite']),
        ({**REWARDED, 'epsilon': -1.0}, ['--epsilon -1.0', '>= 0']),
        ({**REWARDED, 'epsilon_high': float('nan')}, ['--epsilon_high nan', '>= 0']),
        ({**REWARDED, 'delta': 0.0}, ['--delta 0.0', '> 0']),
        ({'gkd_on': 'failed'}, ['--gkd_on failed', '--reward_funcs']),
        ({'gkd_signal': 'sampled'}, ['--gkd_divergence jsd of --beta 0.5', '--gkd_divergence reverse_kl']),
        ({**SAMPLED, 'gkd_divergence': 'tvd'}, ['--gkd_divergence tvd', 'reverse_kl']),
        ({**SAMPLED, 'gkd_loss_weight': 0.0, 'sft_alpha': 1.0}, ['--gkd_loss_weight 0.0', 'no divergence']),
        ({**SAMPLED, 'lmbda': 0.5}, ['--lmbda 0.5', '--sft_alpha 0.0', 'set --lmbda 1']),
        ({**SAMPLED, 'lmbda': 0.0, 'sft_alpha': 1.0}, ['--lmbda 0.0', 'set --lmbda 1']),
        ({**SAMPLED, 'gkd_logits_topk': 4}, ['--gkd_logits_topk 4', 'leave one of them out']),
        ({**SAMPLED, 'gkd_routing': 'teacher'}, ['--gkd_routing teacher', 'leave one of them out']),
        ({**SAMPLED, 'gkd_temperature': 1.0}, ['--gkd_temperature 1.0', '--temperature 0.9', 'leave --gkd_temperature out']),
        ({**SAMPLED, **SERVER}, ['--gkd_temperature 0.9', '--temperature 0.9', 'set --temperature 1']),
        ({**SAMPLED, **SERVER, 'gkd_temperature': 1.0}, ['--gkd_temperature 1.0', '--temperature 0.9', 'set --temperature 1']),
        ({**SAMPLED, 'gkd_teacher_engine': 'vllm', 'gkd_temperature': 1.0}, ['--temperature 0.9', 'set --temperature 1']),
        ({**SAMPLED, 'importance_sampling_level': 'sequence'}, ['--importance_sampling_level sequence', 'use sequence_token']),
        ({'gkd_extrapolation': 0.0}, ['--gkd_extrapolation 0.0', '> 0']),
        ({**SAMPLED, 'gkd_extrapolation': 1.25}, ['--gkd_extrapolation 1.25', '--gkd_signal sampled', 'leave one of them out']),
        ({'gkd_signal': 'some'}, ['--gkd_signal some', 'distribution, sampled']),
    ],
    ids=str,
)
def test_refused_in_one_line(given, parts):
    with pytest.raises(OptionError) as error:
        check_values(Arguments(**given))
    assert '\n' not in str(error.value) and all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    'given',
    [
        REWARDED,
        {**REWARDED, 'gkd_loss_weight': 0.0},
        {**REWARDED, 'gkd_rl_weight': 0.0, 'gkd_num_samples': 1},
        {**REWARDED, 'lmbda': 0.0, 'gkd_eval_source': 'student'},
        SAMPLED,
        {**REWARDED, **SAMPLED},
        {**SAMPLED, 'gkd_divergence': 'jsd', 'beta': 1.0},
        {**SAMPLED, 'lmbda': 0.5, 'sft_alpha': 1.0, 'importance_sampling_level': 'sequence_token'},
        {**SAMPLED, **SERVER, 'temperature': 1.0},
    ],
    ids=str,
)
def test_these_can_be(given):
    check_values(Arguments(**given))
