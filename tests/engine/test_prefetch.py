"""--gkd_prefetch: the next step's responses are generated while a step trains."""

from __future__ import annotations

import helpers
import pytest
from engine_options import STEP

GREEDY = {**STEP, 'temperature': 0, 'gkd_temperature': 1, 'max_steps': 4, 'lmbda': 1, 'log_completions': 'true'}


@pytest.fixture(scope='module')
def runs(run_jobs, servers, tiny_models):
    server = servers['plain'].options
    ahead, frozen = {**GREEDY, **server, 'gkd_prefetch': 'true'}, {'learning_rate': 0}
    evaluated = {'val_dataset': f'{tiny_models.val}#4', 'eval_strategy': 'steps', 'eval_steps': 2, 'gkd_eval_source': 'student'}
    return run_jobs(
        {
            'frozen': {**GREEDY, **server, **frozen},
            'frozen, ahead': {**ahead, **frozen, **evaluated},
            'ahead': ahead,
            'colocate': {**GREEDY, 'use_vllm': 'true', 'vllm_mode': 'colocate', 'gkd_prefetch': 'true'},
        },
        env=helpers.one_rank(),
    )


def test_the_same_training_where_weights_stay(runs):
    """With evaluations in between, which ask the engine too."""
    ahead = runs['frozen, ahead'].ok()
    assert ahead.losses == pytest.approx(runs['frozen'].ok().losses, rel=1e-5)
    first, second = ahead.values('eval_loss')
    assert first == pytest.approx(second, rel=1e-5) and first > 0


def test_responses_are_one_update_old(runs):
    def ages(run):
        return {(line['step'], line['step'] - 1 - line['gen_step']) for line in run.completions}

    assert ages(runs['ahead'].ok()) == {(1, 0), (2, 1), (3, 1), (4, 1)}
    assert ages(runs['frozen']) == {(step, 0) for step in (1, 2, 3, 4)}


def test_needs_a_server(runs):
    assert '--gkd_prefetch true' in runs['colocate'].error and runs['colocate'].loaded == 0
