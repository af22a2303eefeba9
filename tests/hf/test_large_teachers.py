"""A separate teacher that is quantised while it loads, or spread over host and disk: the losses of plain transformers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import commands
import helpers
import job_runs
import pytest
import starts
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

EXAMPLES = Path(__file__).parents[2] / 'examples'
QUANTISERS = Path(sys.prefix) / 'quantisers'
WITH_QUANTISER = {'PYTHONPATH': str(QUANTISERS)}
needs_quantiser = pytest.mark.skipif(
    not (QUANTISERS / 'bitsandbytes').is_dir(), reason=f'there is no bitsandbytes in {QUANTISERS}; scripts/setup.sh installs it'
)
pytestmark = pytest.mark.e2e

ROWS = 4
STEP = {
    'tuner_type': 'full',
    'max_steps': 1,
    'lmbda': 0,
    'temperature': 1.0,
    'optim': 'sgd',
    'learning_rate': 0.01,
    'max_grad_norm': 1e6,
    'callbacks': 'recorder',
    'per_device_train_batch_size': 1,  # LLM.int8 looks for outliers over a whole batch
    'gradient_accumulation_steps': ROWS,
    'train_dataloader_shuffle': 'false',
    'dataset_shuffle': 'false',
}
BITS = {'8 bits': {'load_in_8bit': True}, '4 bits': {'load_in_4bit': True}}
HEAD_TOO = {'load_in_4bit': True, 'llm_int8_skip_modules': ['nothing']}
ANSWERS = {'seq_kd': 'true', 'max_completion_length': 4}


def bnb(bits: int) -> dict:
    return {'teacher_quant_method': 'bnb', 'teacher_quant_bits': bits}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """bitsandbytes' 4-bit kernels for CPUs want multiples of 64 and 32 in every layer; the student's input size has none."""
    return helpers.make_tiny_models(tmp_path_factory.mktemp('models'), head_dim=32)


@pytest.fixture(scope='module')
def rows(models):
    """Token ids, positions that predict a trained token, of the first rows."""
    from swift.model import get_model_processor
    from swift.template import get_template

    _, processor = get_model_processor(str(models.student), model_type='qwen3', load_model=False)
    template = get_template(processor, template_type='qwen3')
    template.set_mode('train')
    thought = len(template.tokenizer.encode('<think>\n\n</think>\n\n', add_special_tokens=False))
    found = []
    for line in models.train.read_text().splitlines()[:ROWS]:
        encoded = template.encode({'messages': json.loads(line)['messages']})
        trained = (torch.tensor(encoded['labels']) != -100).nonzero()[thought:, 0]
        found.append((encoded['input_ids'], trained - 1))
    return found


def loss_and_gradient(student_logits, teacher_logits, rows, student=None):
    """The mean JSD over all trained tokens, from whole logits in fp64."""
    total, count = 0, 0
    for mine, theirs, (_, at) in zip(student_logits, teacher_logits, rows, strict=True):
        s, t = (torch.log_softmax(logits[at].double(), -1) for logits in (mine, theirs))
        m = (0.5 * t.exp() + 0.5 * s.exp()).log()
        total = total + (0.5 * t.exp() * (t - m) + 0.5 * s.exp() * (s - m)).sum()
        count += len(at)
    if student is None:
        return (total / count).item(), None
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in student.named_parameters()}


@pytest.fixture(scope='module')
def plain(models, rows, tmp_path_factory):
    """Whole logits of plain transformers by name, and the directory of a checkpoint that is quantised with its head."""
    root = tmp_path_factory.mktemp('quantised')
    loaded = {name: (str(models.teacher), config) for name, config in BITS.items()}
    loaded['head too'] = str(models.teacher), HEAD_TOO
    task = {'models': loaded, 'ids': [ids for ids, _ in rows], 'out': str(root / 'logits.pt'), 'save': {'head too': str(root / 'head')}}
    (root / 'task.json').write_text(json.dumps(task))
    script = Path(__file__).with_name('quantised.py')
    returncode, output = helpers.run([sys.executable, script, root / 'task.json'], env=WITH_QUANTISER)
    assert returncode == 0, output
    return torch.load(root / 'logits.pt'), root / 'head'


@pytest.fixture(scope='module')
def quantised(run_jobs, models, plain):
    swapped = {'model': models.teacher, 'teacher_model': models.student}
    jobs = {
        # One by one, as in `plain`: which columns of the activations stay in 16 bits is decided for a whole batch.
        '8 bits': {**STEP, **bnb(8), 'gkd_teacher_batch_size': 1},
        '4 bits': {**STEP, **bnb(4)},
        '4 bits, k': {**STEP, **bnb(4), 'gkd_logits_topk': 512},
        'head too': {**STEP, 'teacher_model': plain[1]},
        'student': {**STEP, **swapped, 'tuner_type': 'lora', 'quant_method': 'bnb', 'quant_bits': 4, 'teacher_quant_method': 'none'},
        'answers': {**STEP, **ANSWERS, **bnb(4)},
        'of the start': {**STEP, **bnb(4), 'model': models.teacher},
        'twice': {**STEP, 'teacher_model': plain[1], **bnb(4)},
        'offload': {**STEP, **bnb(4), 'offload_teacher_model': 'true'},
    }
    return run_jobs({name: {**models.with_teacher, **options} for name, options in jobs.items()}, env=WITH_QUANTISER)


@needs_quantiser
@pytest.mark.parametrize(('name', 'logits'), [('8 bits',) * 2, ('4 bits',) * 2, ('4 bits, k', '4 bits'), ('head too',) * 2])
def test_loss_and_gradient_are_those_of_whole_logits_of_the_quantised_teacher(quantised, plain, rows, models, name, logits):
    student = AutoModelForCausalLM.from_pretrained(models.student)
    mine = [student(input_ids=torch.tensor([ids])).logits[0] for ids, _ in rows]
    loss, gradient = loss_and_gradient(mine, plain[0][logits], rows, student)
    run = quantised[name].ok()
    assert run.losses == pytest.approx([loss], rel=1e-5)
    assert job_runs.relative(run.gradients(), gradient) < 1e-4


@needs_quantiser
def test_quantised_teachers_differ(plain, rows, models):
    """Otherwise the test above would not see which of them was loaded."""
    exact = AutoModelForCausalLM.from_pretrained(models.teacher)
    with torch.no_grad():
        found = {'exact': [exact(input_ids=torch.tensor([ids])).logits[0] for ids, _ in rows], **plain[0]}
    for a, b in (('8 bits', 'exact'), ('4 bits', '8 bits'), ('head too', '4 bits')):
        assert (found[a][0] - found[b][0]).abs().max() > 1e-3, (a, b)


@needs_quantiser
def test_the_head_decides_how_the_loss_is_computed(quantised):
    output = quantised['8 bits'].output
    assert output.count('The teacher runs with whole logits, which take more memory, because the output head is a Linear4bit') == 1


@needs_quantiser
def test_a_quantised_student_and_a_teacher_as_it_is(quantised, plain, rows, models):
    teacher = AutoModelForCausalLM.from_pretrained(models.student)
    with torch.no_grad():
        theirs = [teacher(input_ids=torch.tensor([ids])).logits[0] for ids, _ in rows]
    assert quantised['student'].ok().losses == pytest.approx([loss_and_gradient(plain[0]['4 bits'], theirs, rows)[0]], rel=1e-5)


@needs_quantiser
def test_a_quantised_teacher_answers(quantised):
    assert quantised['answers'].ok().values('source/teacher') == [1]


@needs_quantiser
def test_a_quantised_copy_of_the_start_has_something_to_teach(quantised):
    assert quantised['of the start'].ok().losses[0] > 0
    assert 'NOTHING TO LEARN' not in quantised['of the start'].output


@needs_quantiser
def test_refused_before_weights_load(quantised):
    assert 'is quantised already (bnb); leave the option out' in quantised['twice'].error
    assert 'the scales of quantised weights would stay behind' in quantised['offload'].error
    assert quantised['twice'].loaded == quantised['offload'].loaded == 0


# --- spread over host and disk --------------------------------------------------------------------------------------------------


def placed(layer: str, head: str) -> str:
    places = {'model.embed_tokens': 'cpu', 'model.layers.0': 'cpu', 'model.layers.1': layer, 'model.norm': 'cpu'}
    return json.dumps({**places, 'model.rotary_emb': 'cpu', 'lm_head': head})


@pytest.fixture(scope='module')
def spread(run_jobs, models, tmp_path_factory):
    root = tmp_path_factory.mktemp('spread')
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(models.teacher, tie_word_embeddings=True)
    like_teacher = {
        name: value for name, value in config.to_dict().items() if name not in ('model_type', 'architectures', 'mlp_only_layers')
    }
    experts = {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 32, 'tie_word_embeddings': False}
    for name, other in (('tied', config), ('experts', Qwen3MoeConfig(**{**like_teacher, **experts}))):
        shutil.copytree(models.teacher, root / name)
        AutoModelForCausalLM.from_config(other).save_pretrained(root / name)
    tied, experts = root / 'tied', {'teacher_model': root / 'experts', 'teacher_model_type': 'qwen3_moe'}
    step = {**STEP, 'per_device_train_batch_size': 2, 'gradient_accumulation_steps': 2}
    evaluated = {'val_dataset': models.val, 'eval_strategy': 'steps', 'eval_steps': 1, 'per_device_eval_batch_size': 8}
    auto = {'teacher_device_map': 'auto', 'teacher_max_memory': '{"cpu": "150KB"}'}
    jobs = {
        'whole': {**step, **evaluated},
        'layer on disk': {**step, **evaluated, 'teacher_device_map': placed('disk', 'cpu')},
        'head on disk': {**step, **evaluated, 'teacher_device_map': placed('disk', 'disk')},
        'by memory': {**step, **auto},
        'whole, k': {**step, 'gkd_logits_topk': 8},
        'head on disk, k': {**step, 'gkd_logits_topk': 8, 'teacher_device_map': placed('disk', 'disk')},
        'tied': {**step, 'teacher_model': tied},
        'tied, auto': {**step, **auto, 'teacher_model': tied},
        'experts': {**step, **experts},
        'experts, auto': {**step, **auto, **experts},
        'bf16': {**step, 'torch_dtype': 'bfloat16', 'bf16': 'true'},
        'bf16, auto': {**step, **auto, 'torch_dtype': 'bfloat16', 'bf16': 'true', 'teacher_max_memory': '{"cpu": "75KB"}'},
        'answers': {**step, **ANSWERS, **auto},
        'nowhere': {**step, 'teacher_device_map': 'somewhere'},
        'twice': {**step, **auto, 'gkd_teacher_offload': 'layer'},
        'memory alone': {**step, 'teacher_max_memory': auto['teacher_max_memory']},
        'bits': {**step, **bnb(3)},
        'no quantiser': {**step, **bnb(4)},
    }
    return run_jobs({name: {**models.with_teacher, **options} for name, options in jobs.items()})


@pytest.mark.parametrize(
    ('name', 'whole'),
    [
        ('layer on disk', 'whole'),
        ('head on disk', 'whole'),
        ('by memory', 'whole'),
        ('head on disk, k', 'whole, k'),
        ('tied, auto', 'tied'),
        ('experts, auto', 'experts'),  # fused while they are loaded, so not the tensors of the checkpoint
        ('bf16, auto', 'bf16'),
    ],
)
def test_a_teacher_on_the_disk_says_the_same(spread, name, whole):
    run, expected = spread[name].ok(), spread[whole].ok()
    assert run.losses == pytest.approx(expected.losses, rel=1e-6)
    assert job_runs.relative(run.gradients(), expected.gradients()) < 1e-6
    if whole == 'whole' and name != 'by memory':
        assert run.values('eval_loss') == pytest.approx(expected.values('eval_loss'), rel=1e-6)


def test_it_was_on_the_disk(spread):
    lines = [line for line in spread['by memory'].output.splitlines() if 'on the host or the disk and come to the device' in line]
    assert len(lines) == 7
    assert not list(spread['by memory'].output_dir.glob('teacher_weights*'))


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('nowhere', '--teacher_device_map somewhere: must be auto'),
        ('twice', 'and --gkd_teacher_offload layer: give one of them'),
        ('memory alone', 'it belongs to --teacher_device_map auto'),
        ('bits', '--teacher_quant_bits 3 with --teacher_quant_method bnb: must be 4 or 8'),
        ('no quantiser', '--teacher_quant_method bnb: bitsandbytes is not installed'),
        ('answers', 'would come to the device for every token of an answer'),
    ],
)
def test_refused(spread, name, message):
    assert message in spread[name].error
    assert spread[name].loaded == (name == 'answers')


# --- several ranks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def two_ranks(run_jobs, models):
    step = {**STEP, **models.with_teacher, 'gradient_accumulation_steps': 2}
    return run_jobs(
        {
            'ddp on disk': {**step, 'teacher_device_map': placed('disk', 'disk')},
            'ddp 4 bits': {**step, **bnb(4)},
            'ddp auto': {**step, 'teacher_device_map': 'auto'},
            'zero2 teacher zero3': {**step, 'deepspeed': 'zero2', 'teacher_deepspeed': 'zero3'},
            'zero2 teacher zero3_offload': {**step, 'deepspeed': 'zero2', 'teacher_deepspeed': 'zero3_offload'},
            'zero2 4 bits': {**step, **bnb(4), 'deepspeed': 'zero2'},
            'zero3 4 bits': {**step, **bnb(4), 'deepspeed': 'zero3'},
            'zero3 4 bits teacher zero0': {**step, **bnb(4), 'deepspeed': 'zero3', 'teacher_deepspeed': 'zero0'},
            'zero3 on disk': {**step, 'deepspeed': 'zero3', 'teacher_device_map': placed('disk', 'disk')},
            'fsdp2 4 bits': {**step, **bnb(4), 'fsdp': 'fsdp2'},
            'fsdp2 on disk': {**step, 'fsdp': 'fsdp2', 'teacher_device_map': placed('disk', 'disk')},
        },
        nproc=2,
        env=WITH_QUANTISER,
    )


@needs_quantiser
@pytest.mark.parametrize(
    'name',
    [
        'ddp on disk',
        'ddp 4 bits',
        'zero2 teacher zero3',
        'zero2 teacher zero3_offload',
        'zero2 4 bits',
        'zero3 4 bits teacher zero0',
    ],
)
def test_loss_and_gradient_are_those_of_one_process(two_ranks, spread, quantised, name):
    run, one = two_ranks[name].ok(), quantised['4 bits'].ok() if '4 bits' in name else spread['whole'].ok()
    assert run.losses == pytest.approx(one.losses, rel=1e-5)
    assert job_runs.relative(run.gradients(), one.gradients()) < 1e-5


@needs_quantiser
@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('ddp auto', 'with 2 ranks: each of them would take every device'),
        ('zero3 4 bits', '--teacher_quant_method bnb under ZeRO-3'),
        ('zero3 on disk', '--teacher_device_map with --deepspeed: it places the teacher itself; use --teacher_deepspeed zero3_offload'),
        ('fsdp2 4 bits', '--teacher_quant_method bnb with --fsdp: quantised weights come with state that is not sharded'),
        ('fsdp2 on disk', '--teacher_device_map with --fsdp: it places the teacher itself'),
    ],
)
def test_layouts_refused(two_ranks, name, message):
    assert message in two_ranks[name].error
    assert two_ranks[name].loaded == 0


# --- the examples ----------------------------------------------------------------------------------------------------------------

GLOO = """
import deepspeed

deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False  # would be compiled, for a minute; gloo has an all-reduce
deepspeed.init_distributed('gloo')  # before any model asks for ZeRO-3
"""


def run_example(
    script: str, tmp_path: Path, options: dict, variables: dict | None = None, env: dict | None = None
) -> tuple[list[dict], str]:
    """What follows on the command line of an example wins over what is in it."""
    (tmp_path / 'gloo.py').write_text(GLOO)
    argv = helpers.command_line({**helpers.QUICK, 'max_steps': 2, 'output_dir': tmp_path, **options})
    with commands.launchers(env={**starts.ENVIRONMENT, **(env or {})}) as path:
        environment = {'PATH': f'{path}{os.pathsep}{os.environ["PATH"]}', 'OUTPUT': str(tmp_path), **(variables or {})}
        returncode, output = helpers.run([EXAMPLES / script, *argv], env=environment, cwd=tmp_path, timeout=600)
    assert returncode == 0, output[-6000:]
    return [row for row in map(json.loads, (tmp_path / 'logging.jsonl').read_text().splitlines()) if 'loss' in row], output


@pytest.mark.parametrize(('script', 'ranks'), [('omni_lora_self_distillation.sh', '2'), ('omni_lora_self_distillation_small.sh', '1')])
def test_example_of_self_distillation_under_zero3(tiny_models, tmp_path, script, ranks):
    rows = [json.loads(line) for line in tiny_models.train.read_text().splitlines()]
    for row in rows:
        row['teacher_prompt'] = f'The answer is: {row["messages"][1]["content"]} Now, {row["messages"][0]["content"]}'
    dataset = str(helpers.write_rows(tmp_path / 'rows.jsonl', rows))
    variables = {'DATASET': dataset, 'MODEL': str(tiny_models.student), 'NPROC_PER_NODE': ranks}
    options = {
        'model_type': 'qwen3',
        'template': 'qwen3',
        'attn_impl': 'sdpa',
        'ddp_backend': 'gloo',
        'gradient_accumulation_steps': 1,
        'max_completion_length': 4,
        'external_plugins': tmp_path / 'gloo.py',
    }
    logs, output = run_example(script, tmp_path, options, variables)
    assert len(logs) == 2 and all(row['loss'] > 0 for row in logs)
    assert 'teacher: the base with the adapter off (frozen)' in output and 'NOTHING TO LEARN' not in output


@needs_quantiser
def test_example_of_a_quantised_teacher(models, tmp_path):
    options = {**models.with_teacher, 'gradient_accumulation_steps': 1}
    logs, output = run_example('quantised_teacher.sh', tmp_path, options, env=WITH_QUANTISER)
    assert len(logs) == 2 and 'The quantised teacher takes' in output
