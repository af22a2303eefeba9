"""A teacher on the student's own base: the very base to the last bit, whatever adapter the student has, and one copy of the weights."""

from __future__ import annotations

import json
import shutil
import types

import job_runs
import pytest
import torch
from helpers import write_rows
from peft import AdaLoraConfig, BOFTConfig, FourierFTConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from swift_gkd_plugin import checks
from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.hf.routing import RoutingReplay
from swift_gkd_plugin.hf.teachers import TEACHER_ADAPTER, AdapterOnBase, LocalTeacher, SharedBase
from swift_gkd_plugin.teachers.adapters import add_frozen_adapter

QV = ['q_proj', 'v_proj']
EXPERTS = {'target_parameters': job_runs.EXPERTS, 'target_modules': ['q_proj']}
KINDS = {
    'lora': LoraConfig(target_modules=QV),
    'every linear': LoraConfig(target_modules='all-linear'),
    'rslora': LoraConfig(target_modules=QV, use_rslora=True),
    'dora': LoraConfig(target_modules=QV, use_dora=True),
    'head saved': LoraConfig(target_modules=QV, modules_to_save=['lm_head']),
    'embedding saved': LoraConfig(target_modules=QV, modules_to_save=['embed_tokens']),
    'norms saved': LoraConfig(target_modules=QV, modules_to_save=['input_layernorm', 'norm']),
    'lora on head': LoraConfig(target_modules=[*QV, 'lm_head']),
    'lora on embedding': LoraConfig(target_modules=[*QV, 'embed_tokens']),
    'new tokens': LoraConfig(target_modules=QV, trainable_token_indices=[3, 5]),
    'adalora': AdaLoraConfig(target_modules=QV, total_step=10),
    'vera': VeraConfig(target_modules=['q_proj'], r=4),
    'boft': BOFTConfig(target_modules=['q_proj'], boft_block_size=4),
    'fourierft': FourierFTConfig(target_modules=['q_proj'], n_frequency=10),
}
MOE_KINDS = {'experts': LoraConfig(**EXPERTS), 'router': LoraConfig(target_parameters=['mlp.gate.weight'], target_modules=['q_proj'])}


def batch(**other):
    """Two rows, of which five tokens are trained."""
    torch.manual_seed(5)
    index = torch.tensor([3, 4, 5, 16, 17])
    inputs = {'input_ids': torch.randint(0, 512, (2, 12))}
    return types.SimpleNamespace(
        **{'teacher_inputs': None, 'student_inputs': inputs, 'student_index': index, 'teacher_index': index} | other
    )


def said(teacher, one=None):
    """The teacher's logits of a micro-batch's trained tokens."""
    (signal,) = teacher.signals([one or batch()], lambda model, inputs: model(**inputs))
    return signal.logits if hasattr(signal, 'logits') else signal.head.tensors(teacher.adapter).logits(signal.hidden)


def disturbed(model):
    """Training has been here."""
    torch.manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def adapted(path, config, dtype=torch.float32):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), config)
    return disturbed(model).train()


def plain(path, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return LocalTeacher(model, model)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('kind', [*KINDS, *MOE_KINDS])
def test_the_teacher_is_the_base_to_the_last_bit(tiny_models, moe, kind, dtype):
    path = moe if kind in MOE_KINDS else tiny_models.student
    model = adapted(path, (KINDS | MOE_KINDS)[kind], dtype)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert torch.equal(said(SharedBase(model, model)), said(plain(path, dtype)))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained and model.training
    with torch.no_grad():
        assert not torch.equal(model.eval()(**batch().student_inputs).logits, plain(path, dtype).bare(**batch().student_inputs).logits)


@pytest.mark.parametrize('name', ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.self_attn.q_proj.base_layer.weight'])
def test_a_base_that_is_trained_is_no_teacher(tiny_models, name):
    model = adapted(tiny_models.student, KINDS['head saved'])
    model.get_base_model().get_parameter(name).requires_grad_(True)
    with pytest.raises(OptionError, match=f'1 parameters outside the adapter are trained, .*{name} for one'):
        SharedBase(model, model)


OTHERS = {
    'lora': {},
    'dora': {'use_dora': True},
    'head saved': {'modules_to_save': ['lm_head']},
    'lora on head': {'target_modules': ['k_proj', 'lm_head']},
}


PAIRS = [('lora', teachers) for teachers in OTHERS] + [
    ('head saved', 'lora'),
    ('head saved', 'head saved'),
    ('lora on head', 'lora on head'),
]


@pytest.mark.parametrize(('students', 'teachers'), PAIRS)
def test_a_second_adapter_on_the_base(tiny_models, tmp_path, students, teachers):
    """Of another rank and on other layers than the student's; the same bits as a model of its own."""
    path = tiny_models.student
    config = LoraConfig(**{'target_modules': ['k_proj', 'up_proj'], 'r': 4, **OTHERS[teachers]})
    adapted(path, config).save_pretrained(tmp_path)
    model = adapted(path, KINDS[students])
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    add_frozen_adapter(model, tmp_path, TEACHER_ADAPTER)
    after = {name: p for name, p in model.named_parameters() if TEACHER_ADAPTER not in name}
    assert sum(p.requires_grad for p in after.values()) == sum(trained for trained, _ in before.values()) > 0
    assert not any(p.requires_grad for name, p in model.named_parameters() if TEACHER_ADAPTER in name)

    separate = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path)
    student = model(**batch().student_inputs).logits
    teacher = AdapterOnBase(model, model)
    assert torch.equal(said(teacher), said(LocalTeacher(separate, separate)))
    assert not torch.equal(said(teacher), said(plain(path)))
    assert torch.equal(model(**batch().student_inputs).logits, student)  # the student has its own adapter again


# -- the teacher's experts


def forced(model, ids):
    """The model with given experts, by a router that is written out."""
    for layer, chosen in zip(model.model.layers, ids, strict=True):
        router = layer.mlp.gate

        def forward(hidden, router=router, chosen=chosen):
            logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.T
            weights = logits.softmax(-1)[torch.arange(len(logits))[:, None], chosen]
            return logits, weights / weights.sum(-1, keepdim=True), chosen

        router.forward = forward
    return model


def chosen_by(model, inputs):
    ids = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda m, a, out: ids.append(out[2])) for layer in model.model.layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return ids


@pytest.mark.parametrize('checkpointing', [False, True])
def test_routing_of_the_teacher(moe, checkpointing):
    """Loss and gradients are those of autograd through a model that has these experts built in."""
    student = disturbed(AutoModelForCausalLM.from_pretrained(moe))
    ids = chosen_by(AutoModelForCausalLM.from_pretrained(moe), batch().student_inputs)
    assert any((a.sort(-1)[0] != b.sort(-1)[0]).any() for a, b in zip(ids, chosen_by(student, batch().student_inputs), strict=True))
    reference = forced(disturbed(AutoModelForCausalLM.from_pretrained(moe)), ids)
    expected = reference(**batch().student_inputs).logits
    expected.logsumexp(-1).square().sum().backward()

    teacher = plain(moe)
    teacher.routing = RoutingReplay(student, teacher.bare)
    student.train()
    if checkpointing:
        student.gradient_checkpointing_enable({'use_reentrant': False})
    with teacher.routing.replayed():
        said(teacher)
        logits = student(**batch().student_inputs).logits
        logits.logsumexp(-1).square().sum().backward()
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    mine, theirs = ({name: p.grad for name, p in model.named_parameters()} for model in (student, reference))
    assert job_runs.relative(mine, theirs) < 1e-5
    assert not all(map(torch.equal, chosen_by(student, batch().student_inputs), ids))  # afterwards the student chooses for itself


def test_routing_of_a_teacher_with_another_prompt(moe):
    """Where tokens are trained the experts are the teacher's, elsewhere the student's."""
    longer = batch(teacher_inputs={'input_ids': torch.randint(0, 512, (2, 20))}, teacher_index=torch.tensor([11, 12, 13, 32, 33]))
    student, teacher = disturbed(AutoModelForCausalLM.from_pretrained(moe)), plain(moe)
    theirs = chosen_by(teacher.bare, longer.teacher_inputs)
    own = chosen_by(student, longer.student_inputs)
    teacher.routing = RoutingReplay(student, teacher.bare)
    with teacher.routing.replayed():
        said(teacher, longer)
        used = chosen_by(student, longer.student_inputs)
    for layer, ids in enumerate(used):
        assert torch.equal(ids[longer.student_index], theirs[layer][longer.teacher_index])
    others = torch.ones(24, dtype=torch.bool).index_fill(0, longer.student_index, False)
    assert torch.equal(used[0][others], own[0][others])


def test_routing_needs_the_same_routers(tiny_models, moe):
    dense, routed = AutoModelForCausalLM.from_pretrained(tiny_models.student), AutoModelForCausalLM.from_pretrained(moe)
    with pytest.raises(OptionError, match='Qwen3ForCausalLM has no router'):
        RoutingReplay(dense, routed)
    with pytest.raises(OptionError, match=r'the student has 2 routers .* and the teacher 0'):
        RoutingReplay(routed, dense)


GROUPS = {'n_group': 2, 'topk_group': 1, 'n_routed_experts': 4, 'num_experts_per_tok': 2}


def test_routing_among_groups_of_experts():
    """A router that chooses groups first and experts after them: it is the experts that are replayed."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {'hidden_size': 32, 'intermediate_size': 32, 'moe_intermediate_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2}
    sizes |= {'vocab_size': 512, 'q_lora_rank': 8, 'kv_lora_rank': 8, 'qk_rope_head_dim': 8, 'qk_nope_head_dim': 8, 'v_head_dim': 8}
    torch.manual_seed(7)
    teacher, student = (DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **GROUPS, first_k_dense_replace=0)) for _ in range(2))
    replay = RoutingReplay(student, teacher)
    theirs, own = chosen_by(teacher, batch().student_inputs), chosen_by(student, batch().student_inputs)
    with replay.replayed():
        with replay.recorded(batch()):
            teacher(**batch().student_inputs)
        used = chosen_by(student, batch().student_inputs)
    assert all(map(torch.equal, used, theirs)) and not all(map(torch.equal, used, own))


# -- runs

STEP = {**job_runs.ONE_STEP, **job_runs.IN_ORDER, 'tuner_type': 'lora', 'lora_dropout': 0}
TUNERS = {
    'lora': {},
    'rslora': {'use_rslora': 'true'},
    'dora': {'use_dora': 'true'},
    'saved': {'modules_to_save': ['embed_tokens', 'all-norm'], 'target_modules': ['q_proj', 'up_proj']},
    'experts': {'target_modules': ['q_proj', 'v_proj'], 'target_parameters': job_runs.EXPERTS},
}
MOE = ('experts', 'checkpointing', 'routed', 'routed checkpointing', 'routed privileged')


def with_more(row):
    """The prompt that the teacher sees of a row."""
    return f'Well. {row["messages"][0]["content"]}'


@pytest.fixture(scope='module')
def starts(run_jobs, tiny_models, moe):
    """Adapters that one step has moved away from the base."""
    saving = {'learning_rate': 1.0, 'save_strategy': 'steps', 'save_steps': 1}
    jobs = {name: {**STEP, **saving, **options} for name, options in TUNERS.items()}
    jobs['experts'] |= {'model': moe, 'model_type': 'qwen3_moe'}
    jobs['small'] = {**jobs['lora'], 'lora_rank': 2, 'target_modules': ['k_proj', 'lm_head'], 'dataset': tiny_models.val}
    return {name: run.ok().output_dir / 'checkpoint-1' for name, run in run_jobs(jobs).items()}


@pytest.fixture(scope='module')
def runs(run_jobs, tiny_models, moe, starts, tmp_path_factory):
    root = tmp_path_factory.mktemp('shared')
    base, copy, link = tiny_models.student, shutil.copytree(tiny_models.student, root / 'copy'), root / 'link'
    link.symlink_to(base)
    (root / 'other').mkdir()
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    privileged = write_rows(root / 'rows.jsonl', [{**row, 'teacher_prompt': with_more(row)} for row in rows])

    def of(model, name, **more):
        kind = {'model_type': 'qwen3_moe', 'teacher_model_type': 'qwen3_moe'} if model == moe else {}
        return {**STEP, **kind, 'model': model, 'teacher_model': model, 'adapters': starts[name], **more}

    fresh = {**STEP, 'teacher_model': base}
    none = {'teacher_model': None, 'teacher_model_type': None}
    own = {**fresh, **none, 'gkd_self_teacher': 'base'}
    small = {'teacher_adapters': starts['small']}
    routed = of(moe, 'experts', gkd_routing='teacher')
    return run_jobs(
        {name: of(moe if name == 'experts' else base, name) for name in TUNERS}
        | {
            'checkpointing': of(moe, 'experts', gradient_checkpointing='true'),
            'routed': routed,
            'routed checkpointing': {**routed, 'gradient_checkpointing': 'true'},
            'routed privileged': {**routed, 'dataset': privileged},
            'router loss': of(moe, 'experts', router_aux_loss_coef=0.5),
            # The teacher by other names of the base.
            'link': {**fresh, 'teacher_model': link, 'teacher_deepspeed': 'zero2', 'offload_teacher_model': 'true'},
            'detour': {**fresh, 'teacher_model': f'{root}/other/../link/'},
            'from a link': {**fresh, 'model': f'{link}/'},
            # A second adapter.
            'previous': of(base, 'lora', **small),
            'previous, unnamed': {**of(base, 'lora', **small), **none},
            'previous, apart': of(base, 'lora', **small, teacher_model=copy),
            'previous, top-k': of(base, 'lora', **small, gkd_logits_topk=512),
            'previous, saved': of(base, 'saved', **small, save_strategy='steps', save_steps=1),
            'start': of(base, 'lora', teacher_adapters=starts['lora']),
            # The student's base beside a teacher.
            'by one': of(base, 'lora', **small, gkd_extrapolation=1),
            'extrapolated': of(base, 'lora', **small, gkd_extrapolation=1.5),
            'extrapolated, dense': {**of(base, 'lora', **small, gkd_extrapolation=1.5), 'dense': True},
            'extrapolated, saved': of(base, 'saved', **small, gkd_extrapolation=1.5),
            'interpolated, apart': of(base, 'lora', **small, teacher_model=copy, gkd_extrapolation=0.4, dataset=privileged),
            'interpolated, evaluated': {
                **of(base, 'lora', **small, gkd_extrapolation=0.4, dataset=privileged, val_dataset=f'{privileged}#4'),
                **{'eval_strategy': 'steps', 'eval_steps': 1, 'learning_rate': 0},
            },
            'extrapolated, live': {**of(base, 'lora', gkd_extrapolation=1.5), **none},
            'extrapolated, live, fresh': {**fresh, **none, 'gkd_extrapolation': 1.5},
            'conflict': {**fresh, **small, 'modules_to_save': 'lm_head'},
            'two': {**fresh, 'teacher_adapters': [starts['lora'], starts['lora']]},
            # What leaves something else than the base.
            'bias': {**fresh, 'lora_bias': 'all'},
            'pissa': {**fresh, 'init_weights': 'pissa'},
            'extrapolated, bias': {**fresh, 'gkd_extrapolation': 1.5, 'lora_bias': 'all'},
            'own bias': {**own, 'lora_bias': 'all'},
            'own pissa': {**own, 'init_weights': 'pissa'},
            'own, two teachers': {**own, **small},
            'adapters of nothing': {**own, **small, 'gkd_self_teacher': None, 'tuner_type': 'full'},
            'two starts': {**fresh, 'adapters': [starts['lora'], starts['small']]},
            'dropout': {**fresh, 'target_parameters': job_runs.EXPERTS, 'lora_dropout': 0.05},
            'freezing': {**fresh, 'freeze_parameters_ratio': 0.5, 'trainable_parameters': 'lm_head'},
            'routing, dense': {**fresh, 'gkd_routing': 'teacher'},
            'routing, one visit': {**routed, 'teacher_model': copy, 'offload_teacher_model': 'true'},
        }
    )


@pytest.fixture(scope='module')
def reference(tiny_models, moe, starts):
    """Loss and gradient of the first four rows from whole logits and autograd, with models that transformers and PEFT load."""
    from swift.model import get_model_processor
    from swift.template import get_template

    template = get_template(get_model_processor(str(tiny_models.student), model_type='qwen3', load_model=False)[1], template_type='qwen3')
    template.set_mode('train')
    prefix = len(template.tokenizer.encode('<think>\n\n</think>\n\n', add_special_tokens=False))

    def view(row):
        encoded = template.encode(row)
        labels = torch.tensor(encoded['labels'])
        first = (labels != -100).nonzero()[0].item() + prefix
        return {'input_ids': torch.tensor([encoded['input_ids']])}, torch.arange(first - 1, len(labels) - 1)

    def compute(model, adapter, teacher_adapter=None, routed=False, by=1.0, privileged=False, live=False):
        student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), starts[adapter], is_trainable=True)
        teacher = AutoModelForCausalLM.from_pretrained(model)
        if teacher_adapter:
            teacher = PeftModel.from_pretrained(teacher, starts[teacher_adapter])
        total, count = 0, 0
        for line in tiny_models.train.read_text().splitlines()[:4]:
            row = json.loads(line)
            inputs, at = theirs, there = view(row)
            if privileged:
                theirs, there = view({'messages': [{**row['messages'][0], 'content': with_more(row)}, *row['messages'][1:]]})
            if routed:
                forced(student.get_base_model(), chosen_by(teacher, inputs))
            with torch.no_grad():
                t = (student if live else teacher)(**theirs).logits[0, there].log_softmax(-1)
                with student.disable_adapter():
                    r = student(**inputs).logits[0, at].log_softmax(-1)
                t = (by * t + (1 - by) * r).log_softmax(-1)
            s = student(**inputs).logits[0, at].log_softmax(-1)
            m = (0.5 * t.exp() + 0.5 * s.exp()).log()
            total = total + (0.5 * t.exp() * (t - m) + 0.5 * s.exp() * (s - m)).sum()
            count += len(at)
        (total / count).backward()
        return (total / count).item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    return compute


@pytest.mark.parametrize(
    ('name', 'adapter', 'settings'),
    [
        *((name, name, {}) for name in TUNERS),
        ('checkpointing', 'experts', {}),
        ('routed', 'experts', {'routed': True}),
        ('routed checkpointing', 'experts', {'routed': True}),
        ('previous', 'lora', {'teacher_adapter': 'small'}),
        ('previous, unnamed', 'lora', {'teacher_adapter': 'small'}),
        ('previous, apart', 'lora', {'teacher_adapter': 'small'}),
        ('previous, top-k', 'lora', {'teacher_adapter': 'small'}),
        ('previous, saved', 'saved', {'teacher_adapter': 'small'}),
        ('extrapolated', 'lora', {'teacher_adapter': 'small', 'by': 1.5}),
        ('extrapolated, dense', 'lora', {'teacher_adapter': 'small', 'by': 1.5}),
        ('extrapolated, saved', 'saved', {'teacher_adapter': 'small', 'by': 1.5}),
        ('interpolated, apart', 'lora', {'teacher_adapter': 'small', 'by': 0.4, 'privileged': True}),
        ('interpolated, evaluated', 'lora', {'teacher_adapter': 'small', 'by': 0.4, 'privileged': True}),
        ('extrapolated, live', 'lora', {'live': True, 'by': 1.5}),
    ],
)
def test_loss_and_gradient_of_autograd(runs, reference, tiny_models, moe, name, adapter, settings):
    run = runs[name].ok()
    loss, gradient = reference(moe if name in MOE else tiny_models.student, adapter, **settings)
    assert run.loaded == (2 if name.endswith('apart') else 1)
    assert loss > 1e-4 and run.losses[0] == pytest.approx(loss, rel=1e-4)
    assert job_runs.relative(run.gradients(), gradient) < 1e-3


def test_a_reference_looks_only_where_it_counts(runs):
    plain, by_one, beyond = (runs[name].ok() for name in ('previous', 'by one', 'extrapolated'))
    assert by_one.losses == plain.losses and not by_one.values('seconds/reference')
    assert all(map(torch.equal, by_one.gradients().values(), plain.gradients().values()))
    assert beyond.values('seconds/reference') and 'extrapolated by 1.5 from the base with the adapter off (frozen)' in beyond.output
    evaluated = runs['interpolated, evaluated'].ok()
    assert evaluated.values('eval_loss') == [pytest.approx(evaluated.losses[0], rel=1e-5)]


def test_a_live_student_has_something_to_say_beyond_its_base(runs):
    fresh = runs['extrapolated, live, fresh'].ok()
    assert fresh.losses == [0] and 'NOTHING TO LEARN' in fresh.output
    assert runs['extrapolated, live'].ok().losses[0] > 1e-4


def test_routing_makes_a_difference(runs):
    losses = [runs[name].ok().losses[0] for name in ('experts', 'routed', 'routed privileged')]
    assert len(set(losses)) == 3


def test_router_loss_beside_adapted_experts(runs):
    difference = runs['router loss'].ok().losses[0] - runs['experts'].ok().losses[0]
    assert difference > 0.5  # 0.5 x about 2 layers; even routing gives 1


@pytest.mark.parametrize('name', ['link', 'detour', 'from a link'])
def test_one_base_by_any_name(runs, name):
    run = runs[name].ok()
    assert run.loaded == 1 and run.losses == [0]
    assert 'Student: base + adapter (trainable); teacher: the base with the adapter off (frozen).' in run.output


def test_a_hub_s_name_of_a_directory(tiny_models, tmp_path, monkeypatch):
    repository = tmp_path / 'models--some--model'
    shutil.copytree(tiny_models.student, repository / 'snapshots' / 'abc')
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('abc')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    directory = str(repository / 'snapshots' / 'abc')
    args = types.SimpleNamespace(model=directory, model_dir=directory, model_revision=None, teacher_model_revision=None)
    args.use_hf, args.hub_token = True, None
    assert checks.same_weights(args, 'some/model')
    args.model = args.model_dir = str(tiny_models.student)
    assert not checks.same_weights(args, 'some/model')


def test_what_a_shared_base_has_no_use_for_is_said(runs):
    output = runs['link'].ok().output
    for name in ('teacher_deepspeed', 'offload_teacher_model True'):
        assert f'--{name} is not used as such: the teacher is the student itself' in output
    output = runs['freezing'].ok().output
    assert '--freeze_parameters_ratio 0.5 is not used as such: with an adapter the rest of the model is frozen' in output
    assert "--trainable_parameters ['lm_head'] is not used as such: it belongs to --tuner_type full" in output


def test_a_second_adapter_is_not_saved(runs):
    checkpoint = runs['previous, saved'].ok().output_dir / 'checkpoint-1'
    assert not any(TEACHER_ADAPTER in str(path) for path in checkpoint.rglob('*'))
    assert not any(TEACHER_ADAPTER in name for name in load_file(checkpoint / 'adapter_model.safetensors'))


def test_a_teacher_with_the_adapter_of_the_start_has_nothing_to_say(runs):
    run = runs['start'].ok()
    assert run.losses == [0] and run.loaded == 1 and 'NOTHING TO LEARN: the teacher is the base with --teacher_adapters' in run.output


@pytest.mark.parametrize(
    ('name', 'why'),
    [
        ('conflict', 'one of the two adapters trains lm_head as a whole and the other adds to it'),
        ('two', '--teacher_adapters has 2 adapters'),
        ('bias', '--lora_bias all: the biases of the base are trained'),
        ('pissa', '--init_weights pissa: the base is not what it was'),
    ],
)
def test_a_second_copy_where_the_base_will_not_do(runs, name, why):
    run = runs[name].ok()
    assert run.loaded == 2 and 'a second copy of it is loaded' in run.output and why in run.output


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('extrapolated, bias', '--gkd_extrapolation 1.5 with --lora_bias all: the biases of the base are trained'),
        ('own bias', '--gkd_self_teacher base with --lora_bias all'),
        ('own pissa', '--gkd_self_teacher base with --init_weights pissa'),
        ('own, two teachers', '--gkd_self_teacher base and --teacher_adapters'),
        ('adapters of nothing', 'without --teacher_model: name the model that they belong to'),
        ('two starts', '--adapters has 2 adapters; training starts from one'),
        ('dropout', '--target_parameters with --lora_dropout 0.05'),
        ('routing, dense', 'has no routed experts'),
        ('routing, one visit', '--gkd_routing teacher with a teacher that looks at a whole step in one visit'),
    ],
)
def test_refused_before_weights_load(runs, name, message):
    assert message in runs[name].error and runs[name].loaded == 0
