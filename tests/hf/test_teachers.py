"""Every local teacher, against plain transformers and autograd on the whole batch."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import write_rows
from job_runs import IN_ORDER, ONE_STEP
from transformers import AutoModelForCausalLM

from swift_gkd_plugin.hf.teachers import LocalTeacher
from swift_gkd_plugin.teachers import HiddenStates, TopKOptions

STEP = {**ONE_STEP, **IN_ORDER, 'tuner_type': 'full'}
LORA = {**STEP, 'tuner_type': 'lora', 'lora_dropout': 0}


@pytest.fixture(scope='module')
def privileged(tiny_models, tmp_path_factory):
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    for row in rows:
        row['teacher_prompt'] = f'The answer is: {row["messages"][1]["content"]} Now, {row["messages"][0]["content"]}'
    return write_rows(tmp_path_factory.mktemp('privileged') / 'rows.jsonl', rows)


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models, privileged):
    start = run_jobs({'adapter': {**LORA, 'learning_rate': 1.0, 'save_strategy': 'steps', 'save_steps': 1}})['adapter'].ok()
    adapter = start.output_dir / 'checkpoint-1'
    same = {'teacher_model': tiny_models.student}
    none = {'teacher_model': None, 'teacher_model_type': None}
    return run_jobs(
        {
            'separate': STEP,
            'separate forward': {**STEP, 'gkd_divergence': 'forward_kl'},
            'separate beta 0': {**STEP, 'beta': 0},
            'separate beta 1': {**STEP, 'beta': 1},
            'separate T 2': {**STEP, 'gkd_temperature': 2, 'gkd_temperature_squared': 'true'},
            'separate half': {**STEP, 'gkd_loss_weight': 0.5, 'sft_alpha': 0.25},
            'separate topk all': {**STEP, 'gkd_logits_topk': 512},
            'separate topk 4': {**STEP, 'gkd_logits_topk': 4},
            'plain cross-entropy': {**STEP, 'gkd_loss_weight': 0, 'sft_alpha': 1},
            'shared fresh': {**LORA, **same},
            'shared adapter': {**LORA, **same, 'adapters': adapter},
            'teacher adapters': {**LORA, **same, 'teacher_adapters': adapter},
            'shared privileged': {**LORA, **same, 'dataset': privileged},
            'live': {**STEP, **none},
            'live privileged': {**STEP, **none, 'dataset': privileged},
            'separate privileged': {**STEP, 'dataset': privileged},
            'teacher system': {**STEP, 'gkd_teacher_system': 'Answer like a calculator.'},
            'modules_to_save': {**LORA, **same, 'modules_to_save': 'lm_head', 'dataset': privileged},
            'lora on head': {**LORA, **same, 'target_modules': ['q_proj', 'lm_head'], 'dataset': privileged},
            'metrics': {**STEP, 'gkd_detailed_metrics': 'true', 'gkd_logits_topk': 8},
            'small card': {**STEP, 'card': 900_000},  # weights and gradients alone are 920,832 bytes
            'tight card': {**STEP, 'card': 1_000_000},
        }
    )


def test_a_rank_holds_what_was_foretold(runs):
    """To the byte: weights with adapters, gradients, teacher."""
    for name, run in runs.items():
        if name == 'small card':
            continue
        held, foretold = run.ok().memory
        assert held == foretold, name
        assert held['gradients'] and held['student weights'], name


def test_a_run_that_cannot_fit_ends_before_weights_load(runs):
    run = runs['small card']
    assert run.error.startswith("OptionError: Memory: in its phase 'student' a rank holds 899.2 KiB at least (")
    assert 'and cuda:0 has 878.9 KiB; ' in run.error and run.loaded == 0


def test_a_run_that_may_not_fit_is_warned_of(runs):
    assert runs['tight card'].ok().losses == runs['separate'].losses
    (warning,) = [line for line in runs['tight card'].output.splitlines() if 'should it run out of memory: ' in line]
    assert '899.2 KiB of it for certain' in warning and 'cuda:0 has 976.6 KiB' in warning


@pytest.fixture(scope='module')
def reference(tiny_models, privileged):
    """Loss and gradient by whole logits, fp64 and autograd, for the first four rows of a dataset."""
    from swift.model import get_model_processor
    from swift.template import get_template

    def compute(*, dataset=None, teacher=None, beta=0.5, temperature=1.0, weight=1.0, alpha=0.0, system=None, topk=None):
        student, processor = get_model_processor(str(tiny_models.student), model_type='qwen3', torch_dtype=torch.float32)
        other = (
            student
            if teacher == 'live'
            else get_model_processor(str(teacher or tiny_models.teacher), model_type='qwen3', torch_dtype=torch.float32)[0]
        )
        student, other = student.double(), other.double()
        template = get_template(processor, template_type='qwen3')
        template.set_mode('train')
        rows = [json.loads(line) for line in (dataset or tiny_models.train).read_text().splitlines()][:4]
        prefix = template.tokenizer.encode('<think>\n\n</think>\n\n', add_special_tokens=False)

        def view(row, teachers):
            messages = [dict(m) for m in row['messages']]
            if teachers and 'teacher_prompt' in row:
                messages[0]['content'] = row['teacher_prompt']
            if teachers and system:
                messages.insert(0, {'role': 'system', 'content': system})
            encoded = template.encode({'messages': messages})
            ids, labels = torch.tensor([encoded['input_ids']]), torch.tensor(encoded['labels'])
            first = (labels != -100).nonzero()[0].item()
            assert ids[0, first : first + len(prefix)].tolist() == prefix  # never trained: it is part of the prompt
            labels[first : first + len(prefix)] = -100
            return ids, (labels[1:] != -100).nonzero()[:, 0], labels[1:][labels[1:] != -100]

        total, count = 0, 0
        for row in rows:
            ids, at, labels = view(row, False)
            teacher_ids, teacher_at, _ = view(row, True)
            logits = student(input_ids=ids).logits[0, at][:, :512]
            with torch.no_grad():
                teacher_logits = other(input_ids=teacher_ids).logits[0, teacher_at][:, :512]
            s, t = (torch.log_softmax(x / temperature, -1) for x in (logits, teacher_logits))
            if beta == 0:
                d = (t.exp() * (t - s)).sum(-1)
            elif beta == 1:
                d = (s.exp() * (s - t)).sum(-1)
            else:
                m = (beta * t.exp() + (1 - beta) * s.exp()).log()
                d = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
            cross_entropy = -torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
            total = total + (weight * d + alpha * cross_entropy).sum()
            count += len(labels)
        loss = total / count
        loss.backward()
        return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    return compute


@pytest.mark.parametrize(
    'name, settings',
    [
        ('separate', {}),
        ('separate forward', {'beta': 0}),
        ('separate beta 0', {'beta': 0}),
        ('separate beta 1', {'beta': 1}),
        ('separate T 2', {'temperature': 2.0, 'weight': 4.0}),
        ('separate half', {'weight': 0.5, 'alpha': 0.25}),
        ('separate topk all', {}),
        ('plain cross-entropy', {'weight': 0.0, 'alpha': 1.0}),
        ('separate privileged', {'dataset': 'privileged'}),
        ('live privileged', {'dataset': 'privileged', 'teacher': 'live'}),
        ('teacher system', {'system': 'Answer like a calculator.'}),
    ],
)
def test_equals_the_dense_reference(runs, reference, privileged, gradient_difference, name, settings):
    settings = {**settings, **({'dataset': privileged} if settings.get('dataset') else {})}
    run = runs[name].ok()
    loss, gradient = reference(**settings)
    assert run.losses[0] == pytest.approx(loss, rel=1e-5)
    assert gradient_difference({n: g.double() for n, g in run.gradients().items()}, gradient) < 1e-5


def test_shared_base_with_a_fresh_adapter_starts_at_zero_and_says_so(runs):
    run = runs['shared fresh'].ok()
    assert run.losses == [0] and run.values('grad_norm') == [0]
    assert 'NOTHING TO LEARN' in run.output


def test_teacher_adapters_are_the_teachers(runs):
    # JSD at beta = 0.5 is symmetric: base taught by base + adapter is as far away as base + adapter taught by base.
    assert runs['teacher adapters'].ok().losses[0] == pytest.approx(runs['shared adapter'].ok().losses[0], rel=1e-4)


def test_shared_base_learns_from_what_differs(runs):
    for name in ('shared adapter', 'shared privileged', 'modules_to_save', 'lora on head'):
        run = runs[name].ok()
        assert run.losses[0] > 1e-6, name
        assert any(g.norm() > 0 for g in run.gradients().values()), name


def test_shared_base_is_the_base(runs, reference, tiny_models, privileged):
    # A fresh adapter changes nothing, so student and teacher are the base model, asked two questions.
    loss, _ = reference(dataset=privileged, teacher=tiny_models.student)
    assert runs['shared privileged'].ok().losses[0] == pytest.approx(loss, rel=1e-5)
    assert runs['modules_to_save'].ok().losses[0] == pytest.approx(loss, rel=1e-5)
    assert runs['lora on head'].ok().losses[0] == pytest.approx(loss, rel=1e-5)


def test_trained_copy_of_the_head_has_a_gradient(runs):
    assert any('lm_head' in name and g.norm() > 0 for name, g in runs['modules_to_save'].ok().gradients().items())
    assert any('lm_head' in name and g.norm() > 0 for name, g in runs['lora on head'].ok().gradients().items())


def test_live_student_with_the_same_prompt_says_that_it_learns_nothing(runs):
    run = runs['live'].ok()
    assert run.losses == [0] and 'NOTHING TO LEARN' in run.output


def test_topk_is_a_lower_bound(runs):
    assert 0 < runs['separate topk 4'].ok().losses[0] < runs['separate'].ok().losses[0]


def test_detailed_metrics(runs):
    run = runs['metrics'].ok()
    for key in (
        'forward_kl',
        'reverse_kl',
        'student_entropy',
        'teacher_entropy',
        'top1_agreement',
        'teacher_prob_of_label',
        'student_mass_on_topk',
    ):
        assert len(run.values(key)) == 1 and run.values(key)[0] >= 0, key


def test_the_tail_of_a_local_teacher_is_summed_over_what_is_not_listed(tiny_models):
    """Of a confident teacher, where 1 - Σ of the k probabilities is rounding alone."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_models.teacher)
    with torch.no_grad():
        teacher.lm_head.weight[7] *= 300
    local = LocalTeacher(teacher, teacher)
    hidden = 10 * teacher.lm_head.weight[7].detach().sign().repeat(5, 1) * torch.rand(5, 1)
    with torch.no_grad():
        signal = local._reduced(HiddenStates(hidden, local.head), TopKOptions(4, 1.0, None), chunk_tokens=2)
        exact = torch.log_softmax(hidden.double() @ teacher.lm_head.weight.double().T, -1)
    expected = exact.scatter(-1, signal.ids, -torch.inf).logsumexp(-1)
    assert expected.max() < -20
    torch.testing.assert_close(signal.tail.double(), expected, rtol=1e-5, atol=1e-4)
