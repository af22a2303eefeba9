"""--gkd_teacher_engine vllm: the teacher's own engine beside the training process, without and with scoring by it."""

from __future__ import annotations

import helpers
import job_runs
import pytest
from test_teacher_server import SAMPLED, STEP

ENGINE = {'gkd_teacher_engine': 'vllm', 'gkd_teacher_engine_args': helpers.VLLM_ENGINE_FLAGS}
SEQ_KD = {**STEP, 'seq_kd': 'true', 'gkd_logits_topk': None, 'temperature': 0, 'gkd_temperature': 1, 'max_steps': 2}


@pytest.fixture(scope='module')
def runs(run_jobs_with_vllm):
    return run_jobs_with_vllm(
        {
            'local': STEP,
            'scores': {**STEP, **ENGINE},
            'local, sampled': SAMPLED,
            'scores, sampled': {**SAMPLED, **ENGINE},
            'transformers answers': SEQ_KD,
            'answers': {**SEQ_KD, **ENGINE},
        },
        timeout=900,
    )


@pytest.mark.parametrize('signal', ['', ', sampled'])
def test_it_scores_without_another_copy(runs, signal):
    engine, local = runs[f'scores{signal}'].ok(), runs[f'local{signal}'].ok()
    assert engine.loaded == 1 and local.loaded == 2
    assert engine.losses == pytest.approx(local.losses, rel=1e-5)
    assert job_runs.relative(engine.gradients(1), local.gradients(1)) < 1e-5


def test_it_answers_what_transformers_would(runs):
    """Greedy, so the same answers; the full distributions come from the local copy."""
    assert runs['answers'].ok().losses == pytest.approx(runs['transformers answers'].ok().losses, rel=1e-5)
