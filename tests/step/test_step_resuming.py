"""From every point at which a run can be left, the rest is what it would have been: samples, sources, responses, dates and losses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from fake_backend import FEEDBACK, REWARDS, FakeServer, flat
from rank_cases import Stream

from swift_gkd_plugin import sources
from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.step import cycle as cycles
from swift_gkd_plugin.teachers.server import TeacherServerError

KINDS = {
    'responses of all three': {'lmbda': 0.4, 'seq_kd': True},
    'cycles longer than a step': {'steps_per_generation': 4},
    'cycles across steps': {'steps_per_generation': 3, 'lmbda': 1},
    'cycles shorter than a step': {'steps_per_generation': 1, 'gkd_source_per': 'batch'},
    'engine': {'use_vllm': True, 'steps_per_generation': 3},
    'ahead': {'use_vllm': True, 'gkd_prefetch': True},
    'ahead, cycles shorter than a step': {'use_vllm': True, 'gkd_prefetch': True, 'steps_per_generation': 1, 'lmbda': 0.4, 'seq_kd': True},
    'ahead, cycles across steps': {'use_vllm': True, 'gkd_prefetch': True, 'steps_per_generation': 3, 'gkd_source_per': 'batch'},
    'several responses': {'gkd_num_samples': 3, 'steps_per_generation': 4},
    'several responses, one coin for a cycle': {'gkd_num_samples': 3, 'gkd_source_per': 'batch', 'steps_per_generation': 3},
    'engine with a scheduler': {'use_vllm': True, 'steps_per_generation': 4, 'multi_turn_scheduler': 'asks once more', 'lmbda': 1},
    'rewards': {'gkd_num_samples': 4, 'steps_per_generation': 4, 'lmbda': 0.6, **REWARDS},
    'rewards, ahead': {'gkd_num_samples': 2, 'use_vllm': True, 'gkd_prefetch': True, **REWARDS},
    'feedback': {'gkd_num_samples': 4, 'steps_per_generation': 4, 'lmbda': 0.6, 'gkd_rl_weight': 0.0, **REWARDS, **FEEDBACK},
    'feedback, ahead': {'gkd_num_samples': 2, 'use_vllm': True, 'gkd_prefetch': True, **REWARDS, **FEEDBACK},
    'feedback with a scheduler': {
        **{'use_vllm': True, 'steps_per_generation': 4, 'multi_turn_scheduler': 'asks once more', 'lmbda': 1, 'gkd_num_samples': 2},
        **REWARDS,
        **FEEDBACK,
    },
    'endless': {'endless': True, 'steps_per_generation': 4},
}
STEPS = 7  # of 3 in an epoch


@pytest.mark.parametrize('kind', KINDS)
def test_resumed_after_any_step_the_rest_is_the_same(make, kind):
    options = {'max_steps': STEPS, **KINDS[kind]}
    whole = make(**options).train()
    saving = make(**options, save_steps=1).train()
    assert flat(saving) == flat(whole) and saving.losses == whole.losses  # to save changes nothing
    for step in range(1, STEPS):
        resumed = make(**options).train(os.path.join(saving.args.output_dir, f'checkpoint-{step}'))
        assert (step, resumed.steps) == (step, whole.steps[step:])
        assert resumed.losses == whole.losses[step:]
        assert resumed.completions == [line for line in whole.completions if line['step'] > step]
        keys = [call for call in whole.backend.engine_calls if call[0][0] >= step]
        assert [key for key, _, _ in resumed.backend.engine_calls] == [key for key, _, _ in keys]


def test_a_stream_resumes_where_it_was(make, rows):
    options = {'dataset': Stream(rows[:7]), 'max_steps': 5, 'steps_per_generation': 4, 'save_steps': 1}
    whole = make(**options).train()
    for step in range(1, 5):
        resumed = make(**options).train(os.path.join(whole.args.output_dir, f'checkpoint-{step}'))
        assert resumed.steps == whole.steps[step:] and resumed.losses == whole.losses[step:]


def test_what_is_in_flight_is_neither_generated_nor_asked_for_again(make):
    options = {'lmbda': 0.4, 'seq_kd': True, 'steps_per_generation': 4, 'max_steps': 2}
    server = FakeServer()
    whole = make('server', server, **options, save_steps=1).train()
    later = FakeServer()
    resumed = make('server', later, **options).train(os.path.join(whole.args.output_dir, 'checkpoint-1'))
    assert resumed.losses == whole.losses[1:] and resumed.steps == whole.steps[1:]
    # The server's top-k came with its answers, and is in the checkpoint with them.
    assert sum(one['source'] == 'teacher' for one in flat(resumed)) > 0 == len(later.answered)
    assert len(later.scored) == sum(one['source'] == 'student' for one in flat(resumed))
    assert resumed.logs[0].get('tokens/generated', 0) == 0


@pytest.mark.parametrize(
    'kind',
    ['responses of all three', 'cycles longer than a step', 'ahead, cycles shorter than a step', 'three cycles of a step', 'ahead, three'],
)
@pytest.mark.parametrize(
    ('scores_with_answers', 'is_free'),
    [(True, True), (False, True), (False, False)],
    ids=['one request', 'two requests', 'two requests before the step'],
)
def test_resumed_after_any_request_that_failed_the_rest_is_the_same(make, kind, scores_with_answers, is_free):
    three = {'gradient_accumulation_steps': 3, 'steps_per_generation': 1, 'use_vllm': True, 'gkd_source_per': 'batch'}
    options = {
        'max_steps': 3,
        'per_device_train_batch_size': 1,
        **KINDS.get(kind, {**three, 'gkd_prefetch': kind.startswith('ahead')}),
        'lmbda': 0.5,
        'seq_kd': True,
    }
    server = FakeServer(scores_with_answers=scores_with_answers)
    whole = make('server', server, **options).train()
    for dies_after in range(len(server.scored) + len(server.answered)):
        run = make('server', FakeServer(dies_after, scores_with_answers), **options, save_steps=2)
        run.conductor.teacher.is_free = is_free
        with pytest.raises(TeacherServerError, match='is gone'):
            run.train()
        done, checkpoint = run.backend.step, run.backend.checkpoint
        assert run.backend.is_complete(checkpoint)
        resumed = make('server', FakeServer(scores_with_answers=scores_with_answers), **options).train(checkpoint)
        assert (dies_after, resumed.steps) == (dies_after, whole.steps[done:])
        assert resumed.losses == pytest.approx(whole.losses[done:], rel=1e-12)


def test_a_row_that_stood_in_still_does_when_the_fault_has_passed(make, rows):
    """Its response is kept, and belongs to it: an image whose host did not answer may be there again."""
    options = {'lmbda': 1, 'steps_per_generation': 4, 'max_steps': 2}
    run = make(**options, save_steps=1)
    check, broken = run.conductor.encoder.check, set()

    def fails(sample) -> None:
        if sample.row.number in broken and sample.content == run.dataset[sample.row.number]:
            raise ValueError('the host of the image does not answer')
        check(sample)

    broken |= {one['key'][0] for one in flat(make(**options).train())[4:6]}  # of the second step
    run.conductor.encoder.check = fails
    whole = run.train()
    stood_in = [one for one in flat(whole)[4:] if one['question'] != rows[one['key'][0]]['messages'][0]['content']]
    assert len(stood_in) == 2 and all(sources.replacement_row(42, 0, row, 0, 10) != row for row in broken)
    resumed = make(**options).train(os.path.join(run.args.output_dir, 'checkpoint-1'))
    assert resumed.steps == whole.steps[1:] and resumed.losses == whole.losses[1:]


@pytest.mark.parametrize('version', [3, cycles.STATE_VERSION])
def test_a_row_that_stood_in_for_itself_does_so_in_old_checkpoints_alone(make, version):
    """Up to version 3 a row could be drawn in its own place, once an image was there again."""
    options = {'lmbda': 1, 'steps_per_generation': 4, 'max_steps': 2}
    whole = make(**options, save_steps=1).train()
    checkpoint = Path(whole.args.output_dir, 'checkpoint-1')
    file = checkpoint / 'gkd_cycle_rank0.json'
    state = json.loads(file.read_text())
    kept = state['micro_batches'][0][0]
    kept['attempt'] = next(n for n in range(1, 51) if sources.drew_itself(42, kept['epoch'], kept['row'], n - 1, 10))
    file.write_text(json.dumps({**state, 'version': version}))
    resumed = make(**options).train(str(checkpoint))
    assert (resumed.steps == whole.steps[1:]) == (version == 3)
    assert [one['response'] for one in flat(resumed)] == [one['response'] for one in flat(whole)[4:]]


@pytest.mark.parametrize('changed', ['order', 'dataset', 'ranks', 'version'])
def test_a_checkpoint_of_another_run_is_refused(make, rows, changed):
    options = {'lmbda': 1, 'steps_per_generation': 4, 'max_steps': 2}
    whole = make(**options, save_steps=1).train()
    checkpoint = Path(whole.args.output_dir, 'checkpoint-1')
    other = make(
        **options, **({'seed': 1} if changed == 'order' else {}), dataset=Dataset.from_list(rows[: 8 if changed == 'dataset' else 10])
    )
    file, message = checkpoint / 'gkd_cycle_rank0.json', 'the data gives'
    if changed in ('ranks', 'version'):
        name = {'ranks': 'world_size', 'version': 'version'}[changed]
        file.write_text(json.dumps({**json.loads(file.read_text()), name: 7}))
        message = f'{name} 7'
    with pytest.raises(OptionError, match=message):
        other.train(str(checkpoint))


def test_without_responses_in_flight_there_is_no_file(make):
    run = make(lmbda=1, save_steps=1, max_steps=2).train()
    assert not list(Path(run.args.output_dir).rglob('gkd_cycle*'))


def test_weights_alone_are_saved_alone(make):
    run = make('server', FakeServer(9), lmbda=1, steps_per_generation=4, save_steps=1, max_steps=4)
    run.backend.saves_only_weights = True
    with pytest.raises(TeacherServerError):
        run.train()
    assert run.backend.saved and not list(Path(run.args.output_dir).rglob('gkd_cycle*'))
