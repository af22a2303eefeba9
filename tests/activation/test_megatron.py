"""``megatron rlhf``: options, old command lines and what is refused, on stand-ins for megatron-core.

tests/megatron/test_command.py starts the real command."""

from __future__ import annotations

from pathlib import Path

import pytest

from swift_gkd_plugin.arguments import OPTION_NAMES

# The commands of the document that users come with, models and data aside.
SEED_000 = """swift/cli/_megatron/rlhf.py --rlhf_type gkd --model {student} --teacher_model {teacher} --load_safetensors true
    --save_safetensors true --dataset {train} --tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 4
    --global_batch_size 16 --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 --finetune true
    --cross_entropy_loss_fusion true --lr 1e-5 --max_epochs 1 --save {out}/megatron_output --max_length 2048 --beta 0.5
    --temperature 0.9"""
OFF_POLICY = f'{SEED_000} --lr_warmup_fraction 0.05 --min_lr 1e-6 --save_interval 100'
ON_POLICY = f"""{SEED_000} --lmbda 0.5 --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.5 --max_completion_length 512
    --offload_teacher_model true"""
# What the models of the tests need and real ones do not.
TINY = '--model_type qwen3 --template qwen3 --teacher_model_type qwen3 --check_model false --external_plugins {megatron_probe}'


@pytest.mark.command(f'{OFF_POLICY} {TINY}', site='fork')
@pytest.mark.command(f'{ON_POLICY} {TINY}', site='fork')
def test_commands_of_earlier_versions_run_as_they_are(all_finished):
    off_policy, on_policy = all_finished
    args = off_policy.probe['args']
    assert Path(args['output_dir']).name == 'megatron_output'
    assert (args['num_train_epochs'], args['save_steps'], args['use_vllm'], args['lmbda']) == (1, 100, False, 0)
    assert (on_policy.probe['args']['use_vllm'], on_policy.probe['args']['vllm_mode']) == (True, 'colocate')
    for notice in (
        "--max_epochs is spelled --num_train_epochs in today's ms-swift",
        "--save is spelled --output_dir in today's ms-swift",
        "--save_interval is spelled --save_steps in today's ms-swift",
        "--load_safetensors is no option of today's ms-swift and is left out: the weights of --model",
        'Neither --lmbda nor vLLM is asked for: --lmbda is 0',
    ):
        assert off_policy.output.count(notice) == 1
    assert 'Neither --lmbda' not in on_policy.output and on_policy.probe['args']['lmbda'] == 0.5


@pytest.mark.command(f'{OFF_POLICY} {TINY} --beta 1.5', site='fork')
def test_a_refusal_is_one_line(finished):
    """tests/megatron/test_options.py has the others."""
    assert finished.returncode == 1
    assert finished.output.splitlines()[-1].startswith('swift-gkd-plugin: --beta 1.5: must be in [0, 1]'), finished.output[-3000:]
    assert 'Traceback' not in finished.output


@pytest.mark.command('swift/cli/_megatron/rlhf.py --rlhf_type dpo --help', env={'SWIFT_GKD_PLUGIN': '0'}, site='fork')
@pytest.mark.command('swift/cli/_megatron/rlhf.py --rlhf_type dpo --help', site='fork')
@pytest.mark.command('swift/cli/_megatron/rlhf.py --help', site='fork')
def test_help(all_finished):
    dpo_off, dpo_on, gkd = all_finished
    assert dpo_off.returncode == gkd.returncode == 0 and len(dpo_off.output) > 10000
    assert dpo_on == dpo_off
    for name in OPTION_NAMES:
        assert f'--{name}' in gkd.output and f'--{name}' not in dpo_on.output
