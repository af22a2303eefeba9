"""``swift rlhf``: who trains, with which options, in which process. Real command lines; probe.py ends them before weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import swift_gkd_plugin
from swift_gkd_plugin.arguments import OPTION_NAMES

QUICK = '--check_model false --use_cpu true --add_version false --output_dir {out}'
MODEL = '--model {student} --model_type qwen3 --template qwen3 --dataset {train}'
TEACHER = '--teacher_model {teacher} --teacher_model_type qwen3'
# The script that `swift rlhf` starts: without the launcher a test takes two seconds less. The first test goes through it.
GKD = f'swift/cli/rlhf.py --rlhf_type gkd {MODEL} {TEACHER} {QUICK}'

PIPELINE = 'swift_gkd_plugin.hf.pipeline.GKDPipeline'
TRAINER = 'swift_gkd_plugin.hf.trainer.GKDTrainer'
STOCK_PIPELINE = 'swift.pipelines.train.rlhf.SwiftRLHF'
CONFIG = 'swift.rlhf_trainers.arguments.GKDConfig'


@pytest.mark.command(
    f'swift rlhf --rlhf_type=gkd {MODEL} {TEACHER} {QUICK} --external_plugins {{probe}} --seq_kd true --padding_side right '
    '--tuner_type full --lora_dropout 0.05 --multi_turn_scheduler math_tip_trick --max_turns 3 --steps_per_generation 4 '
    '--gkd_divergence skew_reverse_kl --gkd_skew 0.3 --gkd_temperature_squared true --gkd_teacher_system "a b"'
)
def test_options_reach_the_trainer(finished):
    probe = finished.probe
    assert (probe['pipeline'], probe['trainer'], probe['config_class']) == (PIPELINE, TRAINER, CONFIG)
    for place in ('args', 'config'):
        values = probe[place]
        assert (values['gkd_divergence'], values['gkd_skew'], values['gkd_temperature_squared']) == ('skew_reverse_kl', 0.3, True)
        assert values['gkd_teacher_system'] == 'a b'
        assert values['gkd_loss_weight'] == 1.0, 'an option that was not given'
        assert values['seq_kd'] is True, 'refused by stock ms-swift'
        assert (values['multi_turn_scheduler'], values['max_turns']) == ('math_tip_trick', 3), 'lost by stock ms-swift'
    assert probe['args']['padding_side'] == 'right', 'overwritten by stock ms-swift'
    assert probe['config']['disable_dropout'] is False, 'with true, --lora_dropout would be 0'
    assert probe['args']['_teacher_use_disable_adapter'] is False


@pytest.mark.command(f'{GKD} --external_plugins {{probe}}', env={'SWIFT_GKD_PLUGIN': '0'})
def test_switch_gives_stock_back(finished):
    probe = finished.probe
    assert (probe['pipeline'], probe['trainer']) == (STOCK_PIPELINE, 'swift.rlhf_trainers.gkd_trainer.GKDTrainer')
    assert not set(OPTION_NAMES) & {*probe['args'], *probe['config']}


@pytest.mark.command(f'swift/cli/rlhf.py --rlhf_type dpo {MODEL} {QUICK} --external_plugins {{probe}}')
def test_other_types_are_untouched(finished):
    probe = finished.probe
    assert (probe['pipeline'], probe['trainer']) == (STOCK_PIPELINE, 'swift.rlhf_trainers.dpo_trainer.DPOTrainer')
    assert not set(OPTION_NAMES) & {*probe['args'], *probe['config']}


@pytest.mark.command('swift/cli/rlhf.py --rlhf_type dpo --help', env={'SWIFT_GKD_PLUGIN': '0'}, site='fork')
@pytest.mark.command('swift/cli/rlhf.py --rlhf_type dpo --help', site='fork')
@pytest.mark.command('swift/cli/pt.py --help', env={'SWIFT_GKD_PLUGIN': '0'}, site='fork')
@pytest.mark.command('swift/cli/pt.py --help', site='fork')
def test_help_of_everything_else_is_the_same_byte_for_byte(all_finished):
    dpo_off, dpo_on, pt_off, pt_on = all_finished
    assert dpo_off.returncode == pt_off.returncode == 0 and len(dpo_off.output) > len(pt_off.output) > 10000
    assert dpo_on == dpo_off
    assert pt_on == pt_off


@pytest.mark.command('swift/cli/rlhf.py --help', site='fork')
@pytest.mark.command('swift/cli/rlhf.py --rlhf_type gkd --help', site='fork')
def test_help_shows_the_options(all_finished):
    for finished in all_finished:
        assert finished.returncode == 0
        assert 'usage: rlhf.py' in finished.output
        for name in OPTION_NAMES:
            assert f'--{name}' in finished.output
        assert '--gkd_tail {bucket,renormalize}' in finished.output
        assert 'Share of the other model in the mixture' in finished.output


@pytest.mark.command(
    f'swift/cli/rlhf.py --rlhf_type gkd --model /nowhere/at/all {TEACHER} {QUICK} --beta 1.5 --vllm_server_host 127.0.0.1', site='fork'
)
def test_wrong_value_is_one_line_before_anything_is_loaded_or_connected(finished):
    assert finished.returncode != 0
    assert finished.output.splitlines()[-1].startswith('swift-gkd-plugin: --beta 1.5: must be in [0, 1]')
    assert 'Traceback' not in finished.output


EXTERNAL_OPTIONS = '{{"gkd_skew": 0.3, "gkd_loss_weight": 2, "max_pixels": 1003520}}'


@pytest.mark.command(f"{GKD} --external_plugins {{external}} {{probe}} --model_kwargs '{EXTERNAL_OPTIONS}' --seq_kd true", site='bare')
@pytest.mark.command(f"{GKD} --external_plugins {{external}} {{probe}} --model_kwargs '{EXTERNAL_OPTIONS}' --seq_kd true", site='fork')
def test_external_plugins_without_and_with_an_installation(all_finished):
    for finished in all_finished:
        probe = finished.probe
        assert (probe['pipeline'], probe['trainer'], probe['config_class']) == (PIPELINE, TRAINER, CONFIG)
        assert (probe['config']['gkd_skew'], probe['config']['gkd_loss_weight'], probe['config']['gkd_tail']) == (0.3, 2.0, 'bucket')
        assert probe['args']['seq_kd'] is True
        assert [Path(path).name for path in probe['args']['external_plugins']] == ['probe.py'], 'args.json must not name our file'


@pytest.mark.command(f'{GKD} --external_plugins {{external}} {{probe}} --model_kwargs \'{{{{"gkd_skew": 3.0}}}}\'', site='bare fork')
def test_external_options_are_checked(finished):
    assert finished.returncode != 0 and '--gkd_skew 3.0: must be in [1e-6, 1)' in finished.output


@pytest.mark.command(f'{GKD} --external_plugins {{external}} {{probe}}', env={'SWIFT_GKD_PLUGIN': '0'}, site='bare fork')
def test_switch_holds_for_external_plugins_too(finished):
    assert finished.probe['pipeline'] == STOCK_PIPELINE
    assert 'SWIFT_GKD_PLUGIN=0' in finished.output


@pytest.mark.command(f'{GKD} --external_plugins {{probe}} --gkd_skew 0.3', site='wheel')
def test_wheel(finished):
    assert finished.probe['pipeline'] == PIPELINE
    assert finished.probe['config']['gkd_skew'] == 0.3


@pytest.mark.command('python {register_first} {student} {train} {probe}')
@pytest.mark.command('python {register_late} {student} {train} {probe}', site='bare fork')
def test_register_before_and_after_swift_is_imported(all_finished):
    for finished in all_finished:
        assert (finished.probe['pipeline'], finished.probe['trainer']) == (PIPELINE, TRAINER)
        assert finished.probe['config']['gkd_skew'] == 0.3


# The commands of the documents that users come with, models and data aside.
SEED_001 = 'swift/cli/rlhf.py --rlhf_type gkd --model {student} --teacher_model {teacher} --dataset {train} --seq_kd false'
SEED_004 = """swift/cli/rlhf.py --rlhf_type gkd --model {student} --teacher_model {out}/same_student --train_type lora
    --torch_dtype bfloat16 --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules ALL --dataset {train}
    --split_dataset_ratio 0.01 --max_length 2048 --max_completion_length 512 --dataloader_num_workers 4 --dataset_num_proc 4
    --seq_kd false --lmbda 0.5 --temperature 2.0 --beta 0.5 --num_train_epochs 1 --per_device_train_batch_size 4
    --per_device_eval_batch_size 4 --learning_rate 1e-5 --gradient_accumulation_steps 1 --warmup_ratio 0.05 --deepspeed zero3
    --attn_impl flash_attention_2 --output_dir output --eval_steps 50 --save_steps 50 --save_total_limit 2 --logging_steps 5
    --save_only_model true"""
# What the models of the tests need and real ones do not.
TINY = '--model_type qwen3 --template qwen3 --teacher_model_type qwen3 --use_cpu true --check_model false --external_plugins {probe}'


@pytest.mark.command(f'{SEED_001} {TINY}', site='fork')
@pytest.mark.command(f'{SEED_004} --teacher_deepspeed zero3_offload {TINY}', site='fork')
def test_commands_of_earlier_versions_run_as_they_are(all_finished):
    plain, lora = all_finished
    assert plain.probe['pipeline'] == PIPELINE
    args = lora.probe['args']
    assert (args['tuner_type'], args['target_modules'], args['lora_dropout']) == ('lora', ['all-linear'], 0.05)
    assert "--train_type is spelled --tuner_type in today's ms-swift" in lora.output
    assert "--lora_target_modules is spelled --target_modules in today's ms-swift" in lora.output
    # The teacher's directory is a link to the student's: one copy of the weights serves both.
    assert (args['teacher_model'], args['_teacher_use_disable_adapter']) == (None, True)


@pytest.mark.e2e
def test_checkpoint_needs_no_plugin(tmp_path, sites, tiny_models):
    """Trained by --external_plugins, so that args.json could name our file; read where the plugin does not exist."""
    import helpers

    external = Path(swift_gkd_plugin.__file__).parent / 'external.py'
    options = {
        **helpers.QUICK,
        **tiny_models.with_teacher,
        'rlhf_type': 'gkd',
        'tuner_type': 'lora',
        'max_steps': 1,
        'save_strategy': 'steps',
        'output_dir': tmp_path,
        'external_plugins': external,
    }
    train = [sites['bare'], '-m', 'swift.cli.main', 'rlhf', *helpers.command_line(options)]
    returncode, output = helpers.run(train, cwd=tmp_path)
    assert returncode == 0 and 'swift_gkd_plugin.hf.trainer.GKDTrainer of swift-gkd-plugin' in output, output[-4000:]
    checkpoint = tmp_path / 'checkpoint-1'
    saved = json.loads((checkpoint / 'args.json').read_text())
    assert saved['external_plugins'] == [] and str(external) not in (checkpoint / 'args.json').read_text()
    code = f"""
import importlib.util, torch
assert importlib.util.find_spec('swift_gkd_plugin') is None
arguments = torch.load({str(checkpoint / 'training_args.bin')!r}, weights_only=False)
assert type(arguments).__module__ == 'swift.rlhf_trainers.arguments' and arguments.gkd_skew == 0.1
from swift.pipelines import infer_main
infer_main(['--adapters', {str(checkpoint)!r}, '--val_dataset', {str(tiny_models.val)!r} + '#2', '--max_new_tokens', '2',
            '--infer_backend', 'transformers', '--result_path', 'result.jsonl'])
"""
    returncode, output = helpers.run([sites['bare'], '-c', code], cwd=tmp_path)
    assert returncode == 0, output[-4000:]
    assert len((tmp_path / 'result.jsonl').read_text().splitlines()) == 2
