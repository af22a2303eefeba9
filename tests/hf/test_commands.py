"""The documented command lines, as a user types them, in processes of their own."""

from __future__ import annotations

import json
import subprocess

import helpers
import pytest
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


def test_two_ranks_on_the_command_line(tiny_models, tmp_path):
    last = tmp_path / 'last.py'
    last.write_text(
        'import atexit\nimport torch.distributed as dist\natexit.register(lambda: print(f"in a process group: {dist.is_initialized()}"))\n'
    )
    options = {
        **tiny_models.with_teacher,
        **OPTIONS,
        'tuner_type': 'full',
        'dataset': f'{tiny_models.train}#21',
        'max_steps': None,
        'num_train_epochs': 1,
        'save_strategy': 'no',
        'external_plugins': last,
    }
    result = run_swift(options, output_dir=tmp_path, nproc=2).ok()
    assert len(result.values('loss')) == 3  # 21 rows: 8, 8, 5; the last window has one rank with less to do
    assert result.values('tokens/trained')[-1] > 0
    assert result.output.count('in a process group: False') == 2  # whose threads could abort a rank on its way out


def test_checkpoints_need_no_options_of_ours(trained, tiny_models, tmp_path):
    """Where the plugin is installed; tests/activation reads one where it is not."""
    question = helpers.write_rows(tmp_path / 'q.jsonl', [{'messages': [{'role': 'user', 'content': 'what is 1 plus 1 ?'}]}])
    result = run_swift(
        [
            '--adapters',
            str(trained.output_dir / 'checkpoint-3'),
            '--val_dataset',
            str(question),
            '--max_new_tokens',
            '4',
            '--result_path',
            str(tmp_path / 'answers.jsonl'),
            '--torch_dtype',
            'float32',
            '--load_data_args',
            'false',
        ],
        command='infer',
        output_dir=tmp_path,
    ).ok()
    assert result.returncode == 0
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
    run_swift([*map(str, argv)], command='export', output_dir=tmp_path).ok()
    options = {**tiny_models.with_teacher, **OPTIONS, 'tuner_type': 'lora', 'dataset': None, 'cached_dataset': tmp_path / 'cache' / 'train'}
    cached = run_jobs({'cached': {**options, 'max_steps': 1, 'save_strategy': 'no'}})['cached'].ok()
    assert cached.values('loss')[0] == pytest.approx(trained.values('loss')[0], rel=1e-4)  # the same rows, sources and responses
    assert '--cached_dataset' in cached.output and 'is not used as such' in cached.output


def test_swift_export_merges_the_adapter(trained, tmp_path):
    argv = ['--adapters', trained.output_dir / 'checkpoint-3', '--merge_lora', 'true', '--output_dir', tmp_path / 'merged']
    run_swift([*map(str, argv), '--torch_dtype', 'float32'], command='export', output_dir=tmp_path, plugin=False).ok()
    assert (tmp_path / 'merged' / 'model.safetensors').exists()


def test_a_killed_command_resumes(trained, run_jobs, tiny_models, tmp_path):
    options = {**tiny_models.with_teacher, **OPTIONS, 'tuner_type': 'lora', 'output_dir': tmp_path, 'max_steps': 200}
    argv = [*helpers.script('rlhf'), *helpers.command_line({**helpers.QUICK, **options})]
    process = subprocess.Popen(
        [str(a) for a in argv],
        env={**helpers.os.environ, **helpers.OFFLINE},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if 'Saving model checkpoint to' in line and 'checkpoint-3' in line:
            helpers.os.killpg(process.pid, helpers.signal.SIGKILL)
            break
    process.wait(timeout=60)
    resumed = run_jobs({'again': {**OPTIONS, 'tuner_type': 'lora', 'max_steps': 5, 'resume_from_checkpoint': tmp_path / 'checkpoint-2'}})
    resumed = resumed['again'].ok()
    assert len(resumed.values('loss')) == 3
    # The schedule of the learning rate does not reach the third loss, which was computed from the weights of the second step.
    assert resumed.values('loss')[0] == pytest.approx(trained.values('loss')[2], rel=1e-2)
