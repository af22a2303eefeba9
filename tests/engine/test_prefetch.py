"""--gkd_prefetch: the next step's responses are generated while a step trains."""

from __future__ import annotations

import helpers
import pytest
from engine_options import STEP

GREEDY = {**STEP, 'temperature': 0, 'gkd_temperature': 1, 'max_steps': 4, 'lmbda': 1, 'log_completions': 'true'}


@pytest.fixture(scope='module')
def runs(run_jobs, servers, tiny_models, tmp_path_factory):
    server, root = servers['plain'].options, tmp_path_factory.mktemp('prefetch')
    ahead = {**GREEDY, **server, 'gkd_prefetch': 'true'}
    saving = {'save_strategy': 'steps', 'save_steps': 2, 'output_dir': root / 'ahead'}
    frozen = {'learning_rate': 0}
    evaluated = {'val_dataset': tiny_models.val, 'eval_strategy': 'steps', 'eval_steps': 1, 'gkd_eval_source': 'student'}
    return run_jobs(
        {
            'frozen': {**GREEDY, **server, **frozen},
            'frozen, ahead': {**ahead, **frozen},
            'ahead': {**ahead, **saving},
            'resumed': {**ahead, 'resume_from_checkpoint': root / 'ahead' / 'checkpoint-2'},
            'evaluated': {**ahead, **evaluated},
            'colocate': {**GREEDY, 'use_vllm': 'true', 'vllm_mode': 'colocate', 'gkd_prefetch': 'true'},
        },
        env=helpers.one_rank(),
    )


def test_the_same_training_where_weights_stay(runs):
    assert runs['frozen, ahead'].ok().losses == pytest.approx(runs['frozen'].ok().losses, rel=1e-5)


def test_responses_are_one_update_old(runs):
    def ages(run):
        return {(line['step'], line['step'] - 1 - line['generated_at']) for line in run.completions}

    assert ages(runs['ahead'].ok()) == {(1, 0), (2, 1), (3, 1), (4, 1)}
    assert ages(runs['frozen']) == {(step, 0) for step in (1, 2, 3, 4)}


def test_resumes_with_what_was_generated(runs):
    assert runs['resumed'].ok().losses == pytest.approx(runs['ahead'].losses[2:], rel=1e-5)


def test_evaluation_in_between(runs):
    assert runs['evaluated'].ok().losses == pytest.approx(runs['ahead'].losses, rel=1e-5)


def test_needs_a_server(runs):
    assert '--gkd_prefetch true' in runs['colocate'].error and runs['colocate'].loaded == 0
