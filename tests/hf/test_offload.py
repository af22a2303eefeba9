"""A separate teacher that lives on the host: the same step, and no more bytes moved than said."""

from __future__ import annotations

from types import SimpleNamespace

import job_runs
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from transformers import AutoModelForCausalLM

from swift_gkd_plugin.hf.placement import host_copy
from swift_gkd_plugin.hf.teachers import LocalTeacher
from swift_gkd_plugin.teachers.offload import HostCopy, LayerStream, repeated_layers

STEP = {
    'tuner_type': 'full',
    'max_steps': 2,
    'lmbda': 0,
    'learning_rate': 1e-3,
    'per_device_train_batch_size': 2,
    'gradient_accumulation_steps': 3,
    'callbacks': 'recorder',
    'max_grad_norm': 1e6,
}
ANSWERS = {**STEP, 'seq_kd': 'true', 'temperature': 0, 'gkd_temperature': 1}
CPU = torch.device('cpu')


@pytest.fixture
def model(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models.teacher).requires_grad_(False).eval()


def test_a_visit_changes_nothing(model):
    ids = torch.arange(12)[None]
    expected = model(ids).logits
    copy = HostCopy(model.parameters(), CPU)
    before = [p.data_ptr() for p in model.parameters()]
    for visit in (1, 2):
        with copy.on_device():
            assert not set(before) & {p.data_ptr() for p in model.parameters()}
            assert torch.equal(model(ids).logits, expected)
        assert [p.data_ptr() for p in model.parameters()] == before
        assert copy.moved == visit * sum(p.nbytes for p in model.parameters())


def test_two_layers_at_a_time(model):
    ids = torch.arange(12)[None]
    expected, seen = model(ids).logits, []
    stream = LayerStream(model, CPU)
    for layer in repeated_layers(model):
        layer.mlp.register_forward_hook(lambda *_: seen.append(stream.present))
    with stream.on_device():
        assert torch.equal(model(ids).logits, expected)
    assert seen == [2, 1] and stream.present == 0
    assert stream.moved == stream.bytes == sum(p.nbytes for layer in model.model.layers for p in layer.parameters())


def test_an_interrupted_forward_leaves_nothing_behind(model):
    stream = LayerStream(model, CPU)
    before = [p.data_ptr() for p in model.parameters()]

    def fail(*_):
        raise KeyboardInterrupt

    model.model.layers[0].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), stream.on_device():
        model(torch.arange(12)[None])
    assert stream.present == 0 and [p.data_ptr() for p in model.parameters()] == before


def test_mixed_precision_keeps_what_the_head_gets(model):
    """On the way out of a forward accelerate makes everything fp32."""
    model.to(torch.bfloat16)
    model.forward = convert_outputs_to_fp32(torch.autocast('cpu', dtype=torch.bfloat16)(model.forward))
    teacher = LocalTeacher(model, model, host_copy(model, 'model', CPU))
    batch = SimpleNamespace(teacher_inputs=None, student_inputs={'input_ids': torch.arange(12)[None]}, teacher_index=torch.arange(5))
    (signal,) = teacher.signals([batch], lambda model, inputs: model(**inputs))
    assert signal.hidden.dtype == torch.bfloat16 and model(torch.arange(12)[None]).logits.dtype == torch.float32


def test_needs_layers():
    with pytest.raises(ValueError, match='no list of layers'):
        LayerStream(torch.nn.Linear(2, 2), CPU)


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models):
    evaluated = {'val_dataset': tiny_models.val, 'eval_strategy': 'steps', 'eval_steps': 1, 'per_device_eval_batch_size': 1}
    return run_jobs(
        {
            'plain': {**STEP, **evaluated},
            'model': {**STEP, **evaluated, 'gkd_teacher_offload': 'model'},
            'host option': {**STEP, 'offload_teacher_model': 'true'},
            'layer': {**STEP, **evaluated, 'gkd_teacher_offload': 'layer'},
            'layer, batches of 2': {**STEP, 'gkd_teacher_offload': 'layer', 'gkd_teacher_batch_size': 2},
            'k': {**STEP, 'gkd_logits_topk': 8},
            'k, model': {**STEP, 'gkd_logits_topk': 8, 'gkd_teacher_offload': 'model'},
            'answers': ANSWERS,
            'answers, model': {**ANSWERS, 'gkd_teacher_offload': 'model'},
            'answers, layer': {**ANSWERS, 'gkd_teacher_offload': 'layer'},
        }
    )


@pytest.mark.parametrize(
    ('offloaded', 'plain'),
    [
        ('model', 'plain'),
        ('host option', 'plain'),
        ('layer', 'plain'),
        ('layer, batches of 2', 'plain'),
        ('k, model', 'k'),
        ('answers, model', 'answers'),
    ],
)
def test_the_same_steps(runs, offloaded, plain):
    found, expected = runs[offloaded].ok(), runs[plain].ok()
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert job_runs.relative(found.gradients(2), expected.gradients(2)) < 1e-5
    if expected.values('eval_loss') and found.values('eval_loss'):
        assert found.values('eval_loss') == pytest.approx(expected.values('eval_loss'), rel=1e-6)


def test_bytes_of_a_step(runs, tiny_models):
    """All micro-batches share one visit of the model; of a streamed one, each batch of its own makes a visit."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_models.teacher)
    layers = sum(p.nbytes for p in teacher.model.layers.parameters())
    model = sum(p.nbytes for p in teacher.parameters()) - teacher.lm_head.weight.nbytes
    for name, moved in (('model', model), ('layer', layers), ('layer, batches of 2', 3 * layers)):
        steps = runs[name].ok().values('teacher/moved_gib')
        assert [step * 2**30 for step in steps] == pytest.approx([moved, moved], rel=1e-3), name


@pytest.mark.parametrize('name', ['model', 'layer'])
def test_an_evaluation_is_one_visit(runs, tiny_models, name):
    """It has more micro-batches than a step."""
    assert len(tiny_models.val.read_text().splitlines()) > STEP['gradient_accumulation_steps']
    first, second = runs[name].ok().seen['visits']
    assert second - first == 2  # of a step and of an evaluation


def test_refused(runs):
    assert 'every token of an answer would move the whole teacher' in runs['answers, layer'].error
    assert runs['answers, layer'].loaded == 0
