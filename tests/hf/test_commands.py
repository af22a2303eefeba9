"""The documented command lines: training as a user types it, in processes of its own, and what is done with its checkpoints in forks."""

from __future__ import annotations

import json
import os
import signal
import time

import commands
import helpers
import pytest
import starts
from helpers import run_swift

pytestmark = pytest.mark.e2e
OPTIONS = {
    'rlhf_type': 'gkd',
    'max_steps': 3,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 2,
    'lmbda': 0.5,
    'seq_kd': 'true',
    'learning_rate': 1e-3,
    'save_strategy': 'steps',
    'save_steps': 1,
}


@pytest.fixture(scope='module')
def trained(tiny_models, tmp_path_factory):
    options = {**tiny_models.with_teacher, **OPTIONS, 'tuner_type': 'lora'}
    return run_swift(options, output_dir=tmp_path_factory.mktemp('trained'), launcher=True).ok()


def test_trains_and_logs(trained):
    assert len(trained.values('loss')) == 3 and 'swift-gkd-plugin' in trained.output
    for key in ('divergence', 'source/student', 'source/teacher', 'source/dataset', 'seconds/generation'):
        assert len(trained.values(key)) == 3


# How a run goes is beside the point: what each rank is, and how it ends.
LAST = """
import atexit
import torch.distributed as dist
from swift.pipelines.train.sft import SwiftSft

complete = SwiftSft._prepare_flash_ckpt

def tell(self):
    print(f'this rank: {type(self).__name__} {self.args.training_args.gkd_skew}', flush=True)
    complete(self)

SwiftSft._prepare_flash_ckpt = tell
atexit.register(lambda: print(f'in a process group: {dist.is_initialized()}'))
"""


def test_yaml_and_every_rank_of_torchrun(tiny_models, tmp_path):
    (tmp_path / 'last.py').write_text(LAST)
    out = tmp_path / 'out'
    options = {
        **helpers.QUICK,
        **tiny_models.with_teacher,
        **OPTIONS,
        'tuner_type': 'full',
        'gkd_skew': 0.2,
        'dataset': f'{tiny_models.train}#21',
        'max_steps': None,
        'num_train_epochs': 1,
        'save_strategy': 'no',
        'ddp_backend': 'gloo',
        'output_dir': out,
        'external_plugins': [tmp_path / 'last.py'],
        'ENV': {'NPROC_PER_NODE': 2, 'MASTER_PORT': helpers.free_port()},
    }
    given = {name: value for name, value in options.items() if value is not None}
    (tmp_path / 'config.yaml').write_text(json.dumps(given, default=str))  # which YAML includes
    result = run_swift([str(tmp_path / 'config.yaml')], output_dir=out, launcher=True).ok()
    assert result.output.count('this rank: GKDPipeline 0.2') == 2
    assert len(result.values('loss')) == 3  # 21 rows: 8, 8, 5; the last window has one rank with less to do
    assert result.values('tokens/trained')[-1] > 0
    assert result.output.count('in a process group: False') == 2  # whose threads could abort a rank on its way out


def run_here(command: str, argv: list, cwd) -> None:
    status, output = commands.run_here(helpers.script(command)[1], *argv, cwd=cwd)
    assert status == 0, output[-6000:]


def test_checkpoints_need_no_options_of_ours(trained, tiny_models, tmp_path):
    """Where the plugin is installed; tests/activation reads one where it is not."""
    question = helpers.write_rows(tmp_path / 'q.jsonl', [{'messages': [{'role': 'user', 'content': 'what is 1 plus 1 ?'}]}])
    options = {
        'adapters': trained.output_dir / 'checkpoint-3',
        'val_dataset': question,
        'max_new_tokens': 4,
        'result_path': tmp_path / 'answers.jsonl',
        'torch_dtype': 'float32',
        'load_data_args': 'false',
    }
    run_here('infer', helpers.command_line(options), tmp_path)
    assert json.loads((tmp_path / 'answers.jsonl').read_text().splitlines()[0])['response'] is not None
    assert not json.loads((trained.output_dir / 'checkpoint-3' / 'args.json').read_text()).get('external_plugins')


def test_cached_dataset(trained, run_jobs, tiny_models, tmp_path):
    argv = [
        '--model',
        tiny_models.student,
        '--model_type',
        'qwen3',
        '--template',
        'qwen3',
        '--dataset',
        tiny_models.train,
        '--split_dataset_ratio',
        0,
    ]
    argv += ['--to_cached_dataset', 'true', '--output_dir', tmp_path / 'cache', '--max_length', 128, '--torch_dtype', 'float32']
    run_here('export', argv, tmp_path)
    options = {**tiny_models.with_teacher, **OPTIONS, 'tuner_type': 'lora', 'dataset': None, 'cached_dataset': tmp_path / 'cache' / 'train'}
    cached = run_jobs({'cached': {**options, 'max_steps': 1, 'save_strategy': 'no'}})['cached'].ok()
    assert cached.values('loss')[0] == pytest.approx(trained.values('loss')[0], rel=1e-4)  # the same rows, sources and responses
    assert '--cached_dataset' in cached.output and 'is not used as such' in cached.output


def test_swift_export_merges_the_adapter(trained, tmp_path):
    argv = ['--adapters', trained.output_dir / 'checkpoint-3', '--merge_lora', 'true', '--output_dir', tmp_path / 'merged']
    run_here('export', [*argv, '--torch_dtype', 'float32'], tmp_path)
    assert (tmp_path / 'merged' / 'model.safetensors').exists()


def test_a_killed_command_resumes(trained, run_jobs, tiny_models, tmp_path):
    options = {**tiny_models.with_teacher, **OPTIONS, 'tuner_type': 'lora', 'output_dir': tmp_path, 'max_steps': 200}
    argv, log = helpers.command_line({**helpers.QUICK, **options}), tmp_path / 'log.txt'
    how = {'modules': starts.MODULES, 'env': starts.ENVIRONMENT, 'cwd': tmp_path, 'log': log}
    process = starts.start(commands.COMMAND, helpers.script('rlhf')[1], *argv, **how)
    while not any('Saving model checkpoint to' in line and 'checkpoint-3' in line for line in log.read_text().splitlines()):
        assert process.poll() is None, log.read_text()[-6000:]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run_jobs({'again': {**OPTIONS, 'tuner_type': 'lora', 'max_steps': 5, 'resume_from_checkpoint': tmp_path / 'checkpoint-2'}})
    resumed = resumed['again'].ok()
    assert len(resumed.values('loss')) == 3
    # The schedule of the learning rate does not reach the third loss, which was computed from the weights of the second step.
    assert resumed.values('loss')[0] == pytest.approx(trained.values('loss')[2], rel=1e-2)
