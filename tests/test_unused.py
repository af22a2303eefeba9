"""An option that does nothing in some configuration is said once, with the reason, and one that does something is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from swift_gkd_plugin import versions
from swift_gkd_plugin.arguments import GKDOptions
from swift_gkd_plugin.hf.pipeline import NOT_USED as TRANSFORMERS
from swift_gkd_plugin.unused import unused


@dataclasses.dataclass
class Arguments(GKDOptions):
    """Of ms-swift's those that the tables ask for."""

    lmbda: float = 0.5
    beta: float = 0.5
    seq_kd: bool = False
    use_vllm: bool = False
    gkd_logits_topk: Any = None
    teacher_model: Any = None
    teacher_model_server: Any = None
    teacher_deepspeed: Any = None
    offload_teacher_model: bool = False
    teacher_tag_key: str = 'dataset'
    deepspeed: Any = None
    reward_funcs: list = dataclasses.field(default_factory=list)
    reward_model: Any = None
    reward_model_plugin: Any = None
    kl_in_reward: Any = None
    epsilon: float = 0.2
    steps_per_generation: Any = None
    teacher_kl_coef: float = 1.0
    kl_coef: float = 0.05
    rpo_alpha: Any = None
    train_sampling_strategy: str = 'random'


BLIND, SERVER, ENGINE = {'gkd_loss_weight': 0.0, 'lmbda': 0.0}, {'teacher_model_server': 'http://x'}, {'gkd_teacher_engine': 'vllm'}
MODEL = {'teacher_model': 'some/model'}
SEQ_KD = {'seq_kd': True, 'lmbda': 0.0}


@pytest.mark.parametrize(
    ('given', 'others', 'why'),
    [
        # Nobody looks: the teacher only answers.
        ({'gkd_teacher_batch_size': 2}, {**MODEL, **BLIND, **SEQ_KD}, 'no teacher looks'),
        ({'gkd_routing': 'teacher'}, {**MODEL, **BLIND, **SEQ_KD}, 'no teacher looks'),
        ({'gkd_logits_topk': 5}, {**MODEL, **BLIND, **SEQ_KD}, 'no teacher looks'),
        ({'gkd_tail': 'renormalize'}, {'gkd_logits_topk': 5, **BLIND, **SEQ_KD}, 'no teacher looks'),
        ({'beta': 0.3}, {**MODEL, **BLIND, **SEQ_KD}, 'there is no divergence'),
        ({'gkd_divergence': 'tvd'}, {**MODEL, **BLIND, **SEQ_KD}, 'there is no divergence'),
        ({'gkd_skew': 0.3}, {'gkd_divergence': 'skew_forward_kl', **BLIND}, 'there is no divergence'),
        ({'gkd_temperature': 2.0}, BLIND, 'there is no divergence'),
        ({'beta': 0.3}, {'gkd_divergence': 'tvd', **BLIND}, 'there is no divergence'),  # the first of two reasons
        # Nobody looks and nobody answers.
        (MODEL, BLIND, 'answers nothing'),
        (SERVER, BLIND, 'answers nothing'),
        ({'gkd_self_teacher': 'ema'}, BLIND, 'answers nothing'),
        (ENGINE, {**MODEL, **BLIND, 'gkd_logits_topk': 5}, 'it answers with --seq_kd'),
        (MODEL, {**BLIND, **SEQ_KD}, None),
        (MODEL, {**BLIND, 'gkd_eval_source': 'teacher'}, None),
        # The student answers every row.
        ({'seq_kd': True}, {'lmbda': 1.0}, 'the student answers every row'),
        ({'gkd_save_teacher_responses': 'a.jsonl'}, {'seq_kd': True, 'lmbda': 1.0}, 'the student answers every row'),
        ({'gkd_teacher_temperature': 0.5}, {'seq_kd': True, 'lmbda': 1.0}, 'the teacher answers with'),
        ({'gkd_save_teacher_responses': 'a.jsonl'}, SEQ_KD, None),
        # Who looks elsewhere.
        ({'gkd_teacher_batch_size': 2}, {**MODEL, **ENGINE, 'gkd_logits_topk': 5}, 'the engine looks'),
        ({'gkd_teacher_batch_size': 2}, {**MODEL, 'gkd_routing': 'teacher'}, 'each micro-batch'),
        ({'gkd_teacher_batch_size': 2}, SERVER, 'or elsewhere'),
        ({'gkd_teacher_batch_size': 2}, MODEL, None),
        ({'gkd_micro_batch_tokens': 64}, MODEL, 'it belongs to `megatron rlhf`'),
        ({'gkd_optimizer_offload': True}, MODEL, 'it belongs to `megatron rlhf`'),
        ({'gkd_teacher_offload': 'model'}, {**MODEL, **ENGINE, 'gkd_logits_topk': 5}, 'the only copy'),
        ({'gkd_teacher_offload': 'model'}, MODEL, None),
        # An engine is asked like a server.
        ({'gkd_server_in_flight': 4}, {**MODEL, **ENGINE, **SEQ_KD}, None),
        ({'gkd_server_in_flight': 4}, SERVER, None),
        # Of other algorithms.
        ({'kl_in_reward': True}, MODEL, 'it belongs to GRPO'),
        # Of rewards.
        ({'gkd_rl_weight': 0.3}, MODEL, 'it belongs to --reward_funcs'),
        ({'gkd_rl_weight': 0.3}, {**MODEL, 'reward_funcs': ['x']}, None),
        ({'gkd_rl_switch': 0.3}, {**MODEL, 'reward_funcs': ['x']}, 'it belongs to --gkd_rl_schedule switch'),
        ({'gkd_passing_reward': 0.3}, {**MODEL, 'reward_funcs': ['x']}, 'it belongs to --gkd_on'),
        ({'epsilon': 0.1}, MODEL, 'it belongs to rewards and to --gkd_signal sampled'),
        ({'epsilon': 0.1}, {**MODEL, 'gkd_signal': 'sampled'}, None),
        ({'epsilon': 0.1}, {**MODEL, 'reward_funcs': ['x'], 'steps_per_generation': 1}, 'one update per generation'),
        ({'epsilon': 0.1}, {**MODEL, 'reward_funcs': ['x'], 'steps_per_generation': 2}, None),
        ({'gkd_passing_reward': 0.3}, {**MODEL, 'reward_funcs': ['x'], 'gkd_feedback': 'sibling'}, None),
        ({'gkd_rl_weight': 0.3}, {**MODEL, 'reward_model': ['x']}, None),
        ({'reward_model_plugin': ['x']}, MODEL, 'it belongs to --reward_model'),
        ({'reward_model_plugin': ['x']}, {**MODEL, 'reward_model': ['x']}, None),
        ({'gkd_eval_temperature': 0.3}, MODEL, 'see --gkd_eval_source'),
        ({'teacher_kl_coef': 0.5}, MODEL, 'it belongs to GRPO'),
        ({'kl_coef': 0.1}, MODEL, 'it belongs to PPO'),
        ({'rpo_alpha': 1.0}, MODEL, 'it belongs to DPO'),
        ({'train_sampling_strategy': 'sequential'}, MODEL, 'see --train_dataloader_shuffle'),
        ({'gkd_server_timeout': 4.0}, MODEL, 'it belongs to --teacher_model_server and --gkd_teacher_engine vllm'),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, dict) else str(value),
)
def test_one_line_where_an_option_does_nothing(given, others, why):
    (name,) = given
    lines = [line for line in unused(Arguments(**{**others, **given}), TRANSFORMERS) if line.startswith(f'--{name} ')]
    assert len(lines) == (why is not None)
    assert all(f'--{name} {given[name]} is not used as such: ' in line and why in line for line in lines)


def test_versions_that_were_not_tried_are_named(monkeypatch):
    assert versions.untried() == []
    installed = {'torch': '2.15.0+cu130', 'transformers': '5.19.1', 'vllm': '0.31.2'}

    def version(name: str) -> str:
        if name not in installed:
            raise versions.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(versions, 'version', version)
    torch, vllm = versions.untried()
    assert torch.startswith('torch 2.15.0+cu130: ') and 'torch>=2.10,<2.15' in torch and 'vllm 0.31.2: ' in vllm


def test_ranges_are_those_that_pip_keeps_to():
    text = Path(__file__).parents[1].joinpath('pyproject.toml').read_text()
    assert [name for name, tried in versions.TRIED.items() if f'"{name}{tried}"' not in text] == []
