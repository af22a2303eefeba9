"""ms-swift's options that touch the step: each works, is refused, or says that it has no effect (the table in docs/host_options)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers import write_rows
from job_runs import ONE_STEP

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.hf.pipeline import GKDPipeline
from swift_gkd_plugin.unused import OF_OTHERS

STEP = {**ONE_STEP, 'tuner_type': 'full', 'max_steps': 2}


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models, tmp_path_factory):
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    for row in rows:
        row['messages'][1]['loss_scale'] = 2.0
    directory = tmp_path_factory.mktemp('rows')
    weighted, six = write_rows(directory / 'weighted.jsonl', rows), write_rows(directory / 'six.jsonl', rows[:6])
    mixed = {**STEP, 'lmbda': 0.4, 'seq_kd': 'true', 'log_completions': 'true'}
    return run_jobs(
        {
            'plain': STEP,
            'padding_free': {**STEP, 'padding_free': 'true', 'attn_impl': 'sdpa'},
            'padding_free mixed': {**mixed, 'padding_free': 'true', 'attn_impl': 'sdpa'},
            'packing': {**STEP, 'packing': 'true', 'attn_impl': 'sdpa'},
            'streaming': {**STEP, 'streaming': 'true', 'dataset': six, 'callbacks': None},
            'group_by_length': {**STEP, 'group_by_length': 'true'},
            'weighted tokens': {**STEP, 'dataset': weighted, 'is_binary_loss_scale': 'false'},
            'save_only_model': {**STEP, 'save_strategy': 'steps', 'save_steps': 1, 'save_only_model': 'true', 'steps_per_generation': 4},
            'drop_last': {
                **STEP,
                'dataset': f'{tiny_models.train}#10',
                'max_steps': None,
                'num_train_epochs': 1,
                'per_device_train_batch_size': 4,
                'gradient_accumulation_steps': 1,
                'dataloader_drop_last': 'true',
            },
            'device_map': {**STEP, 'device_map': 'cpu'},
            'compiled': {**STEP, 'torch_compile': 'true', 'torch_compile_backend': 'eager', 'callbacks': None},
            'sequence_parallel_size': {**STEP, 'sequence_parallel_size': 2},
            'task_type': {**STEP, 'task_type': 'seq_cls', 'num_labels': 2},
            'truncation split': {**STEP, 'truncation_strategy': 'split'},
            'generation_batch_size': {**mixed, 'generation_batch_size': 8, 'gkd_source_per': 'batch'},
            'both sizes': {**mixed, 'generation_batch_size': 8, 'steps_per_generation': 3},
            'sampling': {
                **mixed,
                'top_k': 5,
                'top_p': 0.9,
                'min_p': 0.01,
                'repetition_penalty': 1.2,
                'gkd_teacher_max_completion_length': 3,
                'gkd_teacher_temperature': 0,
                'max_completion_length': 6,
            },
            'skew': {**STEP, 'gkd_divergence': 'skew_reverse_kl', 'gkd_skew': 0.2},
            'tvd': {**STEP, 'gkd_divergence': 'tvd'},
            'router': {**STEP, 'router_aux_loss_coef': 0.1},
            'idle': {
                **STEP,
                'gkd_divergence': 'tvd',
                'beta': 0.3,
                'gkd_skew': 0.3,
                'gkd_tail': 'renormalize',
                'num_beams': 2,
                'teacher_tensor_model_parallel_size': 2,
                'enable_dft_loss': 'true',
                'teacher_deepspeed': 'zero0',
                'train_sampling_strategy': 'sequential',
                'kl_in_reward': 'true',
            },
            'eval stream': {
                **STEP,
                'streaming': 'true',
                'val_dataset': tiny_models.val,
                'eval_strategy': 'steps',
                'eval_steps': 1,
                'callbacks': None,
            },
            'equal copy': {**STEP, 'teacher_model': tiny_models.student},
            'topk too large': {**STEP, 'gkd_logits_topk': 600},
        }
    )


@pytest.mark.parametrize(
    'name',
    [
        'streaming',
        'group_by_length',
        'save_only_model',
        'generation_batch_size',
        'sampling',
        'skew',
        'tvd',
        'packing',
        'padding_free mixed',
        'router',
    ],
)
def test_works(runs, name):
    run = runs[name].ok()
    assert run.losses and all(0 < loss < 5 for loss in run.losses)


@pytest.mark.parametrize('name', ['padding_free', 'packing', 'device_map'])
def test_layout_of_the_batch_does_not_change_the_step(runs, gradient_difference, name):
    plain, other = runs['plain'].ok(), runs[name].ok()
    assert other.losses == pytest.approx(plain.losses, rel=1e-5)
    assert gradient_difference(other.gradients(1), plain.gradients(1)) < 2e-5


def test_compiled_models_say_the_same(runs):
    assert runs['compiled'].ok().losses == pytest.approx(runs['plain'].ok().losses, rel=1e-5)


def test_a_replayed_choice_of_experts_is_not_compiled():
    pipeline = GKDPipeline.__new__(GKDPipeline)
    args = {'model_info': SimpleNamespace(is_moe_model=True), 'gkd_teacher_engine': 'transformers', 'gkd_logits_topk': None}
    pipeline.args = SimpleNamespace(**args, training_args=SimpleNamespace(torch_compile=True))
    with pytest.raises(OptionError, match='--gkd_routing teacher with --torch_compile'):
        pipeline._check_routing()


def test_no_effect_is_said(runs):
    output = runs['plain'].output  # of all runs of the process
    for option in (
        'group_by_length True',
        'packing True',
        'router_aux_loss_coef 0.1',
        'gkd_tail renormalize',
        'beta 0.3',
        'gkd_skew 0.3',
        'num_beams 2',
        'teacher_tensor_model_parallel_size 2',
        'enable_dft_loss True',
        'teacher_deepspeed',
        'train_sampling_strategy sequential',
        'kl_in_reward True',
    ):
        assert f'--{option} is not used as such: ' in output, option
    # Nothing is said of what nobody has given.
    of_others = [line for line in output.splitlines() if any(f'such: it belongs to {others}' in line for others in OF_OTHERS)]
    assert of_others and all('--kl_in_reward' in line for line in of_others)


def test_token_weights_are_those_of_sft(runs):
    # Every trained token weighs 2, and the denominator is still the number of tokens, as in ms-swift's SFT.
    plain, weighted = runs['plain'].ok(), runs['weighted tokens'].ok()
    assert weighted.losses[0] > 1.5 * plain.losses[0]


def test_refused(runs):
    assert 'sequence_parallel' in runs['sequence_parallel_size'].error
    assert '--task_type seq_cls' in runs['task_type'].error
    assert '--truncation_strategy split' in runs['truncation split'].error
    assert 'generation_batch_size' in runs['both sizes'].error
    assert '--gkd_logits_topk 600' in runs['topk too large'].error and '512' in runs['topk too large'].error


def test_streamed_evaluation_ends(runs):
    run = runs['eval stream'].ok()
    assert len(run.values('eval_loss')) == 2 and run.values('eval_tokens')[0] > 100


def test_an_equal_copy_teaches_nothing_and_that_is_said(runs):
    run = runs['equal copy'].ok()
    assert run.losses[0] == 0 and 'NOTHING TO LEARN' in run.output


def test_model_only_checkpoints_hold_the_model_only(runs):
    files = {path.name for path in (runs['save_only_model'].output_dir / 'checkpoint-1').iterdir()}
    assert 'model.safetensors' in files and not any(name.startswith('gkd_cycle') for name in files)


def test_drop_last(runs):
    assert len(runs['drop_last'].ok().losses) == 2


def test_stream_runs_on_after_its_end(runs):
    run = runs['streaming']
    assert len(run.losses) == 2 and run.values('tokens/trained')[-1] > 0  # 6 rows, 4 per step: the stream starts again in the second


def test_one_coin_per_generation_batch(runs):
    run = runs['generation_batch_size']
    sources = list(zip(run.values('source/student'), run.values('source/teacher'), strict=True))
    assert sources[0] == sources[1] and sources[0] in ((1, 0), (0, 1))  # 8 rows, of both steps


def test_limits_of_the_teacher(runs):
    lengths = {'student': set(), 'teacher': set()}
    for line in runs['sampling'].completions:
        lengths[line['source']].add(line['length'])
    assert max(lengths['teacher']) == 3 and 3 < max(lengths['student']) <= 6
