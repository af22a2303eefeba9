"""The commands of Megatron-SWIFT's GKD document, as they are written there; one of them by the real ``megatron`` and torchrun."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import commands
import helpers
import pytest
from runs import CPU, MODULES

EXAMPLES = Path(__file__).parents[2] / 'examples'
pytestmark = [pytest.mark.e2e, pytest.mark.megatron]

OFF_POLICY = """rlhf --rlhf_type gkd --model {student} --teacher_model {wide} --load_safetensors true --save_safetensors true
    --dataset {train} --tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 4 --global_batch_size 16
    --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 --finetune true --cross_entropy_loss_fusion true
    --lr 1e-5 --lr_warmup_fraction 0.05 --min_lr 1e-6 --max_epochs 1 --save {out}/megatron_output/gkd --save_interval 100
    --max_length 2048 --beta 0.5 --temperature 0.9"""
# What tiny models without a hub and a machine without a GPU need.
TINY = """--model_type qwen3 --template qwen3 --teacher_model_type qwen3 --check_model false --ddp_backend gloo --torch_dtype float32
    --bf16 false --fp16 false --dataloader_num_workers 0 --dataset_num_proc 1 --load_from_cache_file false --bias_dropout_fusion false
    --no_save_optim true --logging_steps 1 --add_version false"""


def words(line: str, models, tiny_models, out: Path) -> list[str]:
    return shlex.split(line.format(**models, train=tiny_models.train, out=out))


def test_off_policy_command_as_it_is_written(models, tiny_models, tmp_path):
    argv = [sys.executable, '-m', 'swift.cli._megatron.main', *words(f'{OFF_POLICY} {TINY}', models, tiny_models, tmp_path)]
    env = {**CPU, 'NPROC_PER_NODE': '2', 'MASTER_PORT': str(helpers.free_port()), 'PATH': f'{helpers.SCRIPTS}:{os.environ["PATH"]}'}
    returncode, output = helpers.run(argv, env=env, cwd=tmp_path)
    assert returncode == 0, output[-6000:]
    assert 'swift_gkd_plugin.megatron.trainer.GKDTrainer of swift-gkd-plugin' in output
    assert '--lmbda is 0, the student answers nothing' in output
    assert 'Output heads with 512 (student) and 536 (teacher) columns' in output
    saved = tmp_path / 'megatron_output' / 'gkd'
    rows = [json.loads(row) for row in (saved / 'logging.jsonl').read_text().splitlines()]
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 4 and all(0.3 < loss < 0.4 for loss in losses)  # 64 rows in steps of 16
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved / 'checkpoint-4')


def test_example_of_sequence_level_distillation(models, tiny_models, tmp_path):
    variables = {'MODEL': models['student'], 'TEACHER': models['teacher'], 'DATASET': tiny_models.train, 'OUTPUT': tmp_path / 'out'}
    env = {name: str(value) for name, value in variables.items()}
    argv = ['bash', EXAMPLES / 'megatron_seq_kd.sh', *shlex.split(TINY), '--max_completion_length', 6]
    with commands.launchers(MODULES, CPU) as path:
        env |= {'NPROC_PER_NODE': '2', 'PATH': f'{path}:{os.environ["PATH"]}'}
        returncode, output = helpers.run(argv, env=env, cwd=tmp_path, timeout=300)
    assert returncode == 0, output[-6000:]
    rows = [json.loads(row) for row in (tmp_path / 'out' / 'answers.jsonl').read_text().splitlines()]
    assert len(rows) == 64 and all(1 <= len(row['response_token_ids']) <= 6 for row in rows)
    logs = [json.loads(row) for row in (tmp_path / 'out' / 'logging.jsonl').read_text().splitlines()]
    assert [row['source/teacher'] for row in logs if 'loss' in row] == [1, 1, 1, 1]


def test_wrong_layout_is_one_line_before_any_weights(models, tiny_models, tmp_path):
    _, *argv = words(f'{OFF_POLICY} {TINY} --pipeline_model_parallel_size 2', models, tiny_models, tmp_path)
    script = helpers.script('_megatron/rlhf')[1]
    status, output = commands.run_here(script, *argv, modules=MODULES, env=CPU, ranks=2, cwd=tmp_path)
    assert status != 0
    lines = [line for line in output.splitlines() if 'does not divide the 2 ranks' in line]
    assert len(lines) == 1 and lines[0].startswith('swift-gkd-plugin: --tensor_model_parallel_size 2 x --pipeline_model_parallel_size 2')
