"""Runs of the trainer for the tests of this directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import job_runs
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


@pytest.fixture(scope='session')
def run_jobs(tmp_path_factory, tiny_models) -> job_runs.JobRunner:
    return job_runs.JobRunner(tmp_path_factory, tiny_models, Path(__file__).with_name('jobs.py'))


@pytest.fixture(scope='session')
def gradient_difference() -> Callable[..., float]:
    return job_runs.relative


@pytest.fixture(scope='session')
def judges(tiny_models, tmp_path_factory) -> dict[str, Path]:
    """Reward models of the student's size; one of them says no number."""
    root = tmp_path_factory.mktemp('judges')
    config = AutoConfig.from_pretrained(tiny_models.student, num_labels=1)
    for name in ('judge', 'none'):
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_config(config)
        if name == 'none':
            model.score.weight.data.fill_(torch.nan)
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(tiny_models.student).save_pretrained(root / name)
    return {name: root / name for name in ('judge', 'none')}


@pytest.fixture(scope='session')
def moe(tiny_models, tmp_path_factory):
    """A Qwen3-MoE of the tiny student's size with four experts, and its tokenizer."""
    path = tmp_path_factory.mktemp('moe')
    like = AutoModelForCausalLM.from_pretrained(tiny_models.student).config.to_dict()
    like |= {'model_type': 'qwen3_moe', 'architectures': ['Qwen3MoeForCausalLM'], 'decoder_sparse_step': 1}
    torch.manual_seed(4)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**like | {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 16, 'norm_topk_prob': True})
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_()  # so that tokens differ in where they go
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_models.student).save_pretrained(path)
    return path
