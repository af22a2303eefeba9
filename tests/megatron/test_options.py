"""What the Megatron back end refuses, option by option; tests/activation and test_command.py run one each as a command."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import starts

from swift_gkd_plugin.arguments import GKDOptions, OptionError
from swift_gkd_plugin.megatron.options import (
    check_layout,
    check_model,
    check_overrides,
    check_precision,
    check_routing,
    check_supported,
    check_teacher,
    loads_teacher,
    teacher_arguments,
)

DEFAULTS = {f.name: f.default for f in fields(GKDOptions)} | dict(
    model='student',
    teacher_model='teacher',
    teacher_adapters=[],
    tuner_type='full',
    target_modules=['all-linear'],
    seq_kd=False,
    gkd_logits_topk=None,
    lmbda=0.0,
    use_vllm=False,
    use_ray=False,
    vllm_mode=None,
    teacher_model_server=None,
    optimizer_cuda_graph=False,
    streaming=False,
    train_iters=None,
    save_strategy='steps',
    moe_aux_loss_coeff=0.0,
    moe_z_loss_coeff=None,
    moe_expert_capacity_factor=None,
    moe_router_load_balancing_type=None,
    use_megatron_fsdp=False,
    bridge_backend='mcore-bridge',
    mtp_num_layers=None,
    router_replay_mode='disabled',
    sequence_packing_scheduler=None,
    reward_model=None,
    task_type=None,
    micro_batch_size=1,
    global_batch_size=16,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    context_parallel_size=1,
    expert_model_parallel_size=1,
    expert_tensor_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    pipeline_model_parallel_layout=None,
    decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None,
    sequence_parallel=False,
    tp_comm_overlap=False,
    fp8=None,
    fp8_format=None,
    fp8_param_gather=False,
    fp4=None,
    fp4_format=None,
    fp4_param_gather=False,
    megatron_extra_kwargs=None,
)


def options(**given) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **given})


@pytest.mark.parametrize(
    'given',
    [
        dict(use_vllm=True),
        dict(use_ray=True),
        dict(gkd_teacher_offload='layer'),
        dict(gkd_optimizer_offload=True, optimizer_cuda_graph=True),
        dict(fp8_param_gather=True, gkd_self_teacher='ema', teacher_model=None),
        dict(fp4_param_gather=True, gkd_self_teacher='ema', teacher_model=None),
        dict(streaming=True),
        dict(save_strategy='epoch', streaming=True, train_iters=5),
        dict(gkd_micro_batch_tokens=4096, moe_aux_loss_coeff=[0.01]),
        dict(gkd_micro_batch_tokens=4096, moe_expert_capacity_factor=1.0),
        dict(use_megatron_fsdp=True),
        dict(bridge_backend='megatron-bridge'),
        dict(mtp_num_layers=1),
        dict(router_replay_mode='R2'),
        dict(sequence_packing_scheduler='dp_balanced'),
        dict(reward_model=['a/judge']),
        dict(task_type='seq_cls'),
        dict(tuner_type='lora_llm'),
        dict(tuner_type='lora', target_modules=['all-router'], teacher_model='student'),
        dict(tuner_type='lora', target_modules=['all-router'], gkd_extrapolation=1.5),
    ],
    ids=str,
)
def test_refused(given):
    name = 'target_modules' if 'target_modules' in given else 'vllm_mode' if 'use_vllm' in given else next(iter(given))
    with pytest.raises(OptionError, match=f'^--{name} [^\n]*$'):
        check_supported(options(**given))


@pytest.mark.parametrize(
    'given',
    [
        {},
        dict(lmbda=0.5),
        dict(seq_kd=True, gkd_eval_source='teacher'),
        dict(lmbda=0.5, use_vllm=True, vllm_mode='colocate'),
        dict(gkd_self_teacher='ema', teacher_model=None),
        dict(gkd_optimizer_offload=True),
        dict(gkd_optimizer_offload=False, optimizer_cuda_graph=True),
        dict(streaming=True, train_iters=5),
        dict(gkd_micro_batch_tokens=4096, moe_aux_loss_coeff=[0.0]),
        dict(tuner_type='lora', teacher_model='student'),
    ],
)
def test_supported(given):
    check_supported(options(**given))


@pytest.mark.parametrize(
    ('given', 'loads'),
    [
        ({}, True),
        (dict(teacher_model=None), False),
        (dict(gkd_loss_weight=0), False),
        (dict(gkd_loss_weight=0, seq_kd=True), True),
        (dict(gkd_teacher_engine='vllm'), True),  # it does not score over the whole vocabulary
        (dict(gkd_teacher_engine='vllm', gkd_logits_topk=8, gkd_eval_source='teacher'), False),
        (dict(gkd_teacher_engine='vllm', gkd_loss_weight=0, seq_kd=True), False),
    ],
    ids=str,
)
def test_who_holds_the_teacher(given, loads):
    assert loads_teacher(options(**given)) == loads


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(tensor_model_parallel_size=3), r'= 3 does not divide the 8 ranks'),
        (dict(tensor_model_parallel_size=4, context_parallel_size=4), r'= 16 does not divide the 8 ranks'),
        (dict(expert_model_parallel_size=3), r'--expert_model_parallel_size 3 x .* = 3 does not divide the 8 ranks'),
        (dict(pipeline_model_parallel_size=0), r'--pipeline_model_parallel_size 0: must be at least 1'),
        (dict(global_batch_size=12), r'--global_batch_size 12: must be a multiple of --micro_batch_size 1 x 8'),
        (dict(virtual_pipeline_model_parallel_size=2), r'needs --pipeline_model_parallel_size of at least 2'),
        (
            dict(virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=4, global_batch_size=12),
            r'a multiple of --pipeline_model_parallel_size 4 micro-batches per step, and --global_batch_size gives 6',
        ),
    ],
    ids=str,
)
def test_layout_that_does_not_fit_the_ranks(given, message, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(OptionError, match=message):
        check_layout(options(**given))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(teacher_tensor_model_parallel_size=3), r'--teacher_tensor_model_parallel_size 3 x .* = 3 does not divide the 8 ranks'),
        # Sizes that are not given are the student's.
        (
            dict(tensor_model_parallel_size=4, teacher_context_parallel_size=4),
            r'--teacher_tensor_model_parallel_size 4 x .* --teacher_context_parallel_size 4 = 16 does not divide the 8 ranks',
        ),
        (dict(teacher_expert_model_parallel_size=16), r'--teacher_expert_model_parallel_size 16 x .* = 16 does not divide the 8 ranks'),
        (dict(teacher_pipeline_model_parallel_size=0), r'--teacher_pipeline_model_parallel_size 0: must be at least 1'),
        (
            dict(teacher_tensor_model_parallel_size=2, teacher_model=None),
            r'--teacher_tensor_model_parallel_size 2: only a --teacher_model other than the student has a layout of its own',
        ),
    ],
    ids=str,
)
def test_layout_of_the_teacher_that_does_not_fit_the_ranks(given, message, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    with pytest.raises(OptionError, match=f'^{message}[^\n]*$'):
        check_layout(options(**given))


def test_layouts_that_fit(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    for given in (
        {},
        dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2),
        dict(teacher_tensor_model_parallel_size=8),
        dict(pipeline_model_parallel_size=8, teacher_pipeline_model_parallel_size=1, teacher_expert_model_parallel_size=8),
    ):
        check_layout(options(**given))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(pipeline_model_parallel_size=4), 'its 6 layers do not split into 4 pipeline stages'),
        (dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2), 'its 6 layers do not split into 4 pipeline stages'),
        (dict(tensor_model_parallel_size=3), 'its 4 attention heads do not split'),
        (dict(expert_model_parallel_size=3), 'its 8 experts do not split'),
        (dict(tensor_model_parallel_size=2), 'has experts, which megatron-core trains with --tensor_model_parallel_size 2 only'),
        (dict(tensor_model_parallel_size=2, sequence_parallel=True), 'with .* megatron-core gets wrong gradients for the experts'),
    ],
    ids=str,
)
def test_model_that_does_not_fit_the_layout(given, message):
    config = SimpleNamespace(num_hidden_layers=6, num_attention_heads=4, num_experts=8)
    config.get_text_config = lambda: config
    with pytest.raises(OptionError, match=f'^--model m: {message}'):
        check_model('--model', 'm', config, options(**given))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (
            dict(teacher_pipeline_model_parallel_size=4),
            'its 6 layers do not split .* choose another --teacher_pipeline_model_parallel_size',
        ),
        (dict(teacher_tensor_model_parallel_size=8), 'its 4 attention heads do not split over --teacher_tensor_model_parallel_size 8'),
        (dict(teacher_expert_model_parallel_size=3), 'its 8 experts do not split over --teacher_expert_model_parallel_size 3'),
        # The uneven stages of the student are not those of other stages.
        (
            dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=2, teacher_pipeline_model_parallel_size=4),
            'its 6 layers do not split into 4 pipeline stages',
        ),
    ],
    ids=str,
)
def test_teacher_that_does_not_fit_its_layout(given, message):
    config = SimpleNamespace(num_hidden_layers=6, num_attention_heads=4, num_experts=8)
    config.get_text_config = lambda: config
    with pytest.raises(OptionError, match=f'^--teacher_model m: {message}'):
        check_teacher('m', config, options(**given))


def test_key_value_heads_that_do_not_split():
    config = SimpleNamespace(num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4)
    config.get_text_config = lambda: config
    with pytest.raises(OptionError, match=r'^--model m: its 4 key-value heads do not split over --tensor_model_parallel_size 6'):
        check_model('--model', 'm', config, options(tensor_model_parallel_size=6))
    check_model('--model', 'm', config, options(tensor_model_parallel_size=12))


def test_layout_of_the_teacher_follows_the_student():
    args = options(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1)
    theirs = teacher_arguments(args)
    assert vars(theirs) == vars(args) and theirs is not args
    # With other stages the layers are dealt out evenly; experts under tensor parallelism bring sequence parallelism with them.
    theirs = teacher_arguments(options(**vars(args) | dict(teacher_pipeline_model_parallel_size=1)))
    assert theirs.virtual_pipeline_model_parallel_size is None and theirs.decoder_first_pipeline_num_layers is None
    # ms-swift takes it from a student without tensor parallelism, be it asked for or not.
    own = options(tensor_model_parallel_size=1, teacher_tensor_model_parallel_size=8)
    assert [teacher_arguments(own, experts).sequence_parallel for experts in (False, True)] == [True, True]
    without = options(tensor_model_parallel_size=2, teacher_tensor_model_parallel_size=8)
    assert [teacher_arguments(without, experts).sequence_parallel for experts in (False, True)] == [False, True]
    assert teacher_arguments(options(**vars(without) | dict(sequence_parallel=True))).sequence_parallel
    assert not teacher_arguments(
        options(tensor_model_parallel_size=2, sequence_parallel=True, teacher_tensor_model_parallel_size=1)
    ).sequence_parallel


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (dict(lmbda=0.5), '--lmbda 0.5: a student with --fp8_format hybrid .*--use_vllm true, or --lmbda 0'),
        (dict(gkd_eval_source='student'), '--gkd_eval_source student: .*--use_vllm true, or dataset'),
        (dict(seq_kd=True, teacher_model=None), '--seq_kd True: .*separate --teacher_model'),
        (dict(gkd_eval_source='teacher', teacher_model=None), '--gkd_eval_source teacher: .*separate --teacher_model'),
        (dict(lmbda=1.0, fp8_format=None, fp4_format='e2m1'), '--lmbda 1.0: a student with --fp4_format e2m1 '),
    ],
    ids=str,
)
def test_answers_of_a_student_in_few_bits(given, message):
    with pytest.raises(OptionError, match=f'^{message}[^\n]*$'):
        check_precision(options(**{'fp8_format': 'hybrid', **given}))


@pytest.mark.parametrize(
    'given',
    [
        {},
        dict(lmbda=0.5, gkd_eval_source='student', use_vllm=True),
        dict(seq_kd=True, gkd_eval_source='teacher'),  # a separate one
        dict(seq_kd=True, teacher_model=None, teacher_model_server='http://localhost:8000'),
        dict(lmbda=0.5, fp8_format=None),
    ],
    ids=str,
)
def test_training_in_few_bits(given):
    check_precision(options(**{'fp8_format': 'hybrid', **given}))


def test_teacher_has_all_its_bits():
    args = options(fp8='e4m3', fp8_format='e4m3', fp8_param_gather=True, fp4='e2m1', fp4_format='e2m1', fp4_param_gather=True)
    args.megatron_extra_kwargs = {'fp8_recipe': 'blockwise', 'cp_comm_type': 'a2a'}
    for given in ({}, dict(teacher_tensor_model_parallel_size=2)):
        theirs = vars(teacher_arguments(options(**vars(args) | given)))
        assert [value for name, value in theirs.items() if name.startswith(('fp8', 'fp4'))] == [None, None, False] * 2
        assert theirs['megatron_extra_kwargs'] == {'cp_comm_type': 'a2a'} and 'fp8_recipe' in args.megatron_extra_kwargs


@pytest.mark.parametrize(
    'given', [{'hierarchical_context_parallel_sizes': [2, 4]}, {'cp_comm_type': 'a2a+p2p'}, {'cp_comm_type': ['p2p', 'a2a+p2p']}], ids=str
)
def test_groups_that_nobody_makes(given):
    with pytest.raises(OptionError, match=f'^--megatron_extra_kwargs {next(iter(given))} .* makes no hierarchical'):
        check_overrides(options(megatron_extra_kwargs=given))


def test_routing_that_cannot_be_replayed():
    def config(layers: int = 2, experts: int = 4) -> SimpleNamespace:
        found = SimpleNamespace(num_hidden_layers=layers, num_experts=experts)
        found.get_text_config = lambda: found
        return found

    taught = dict(gkd_routing='teacher', teacher_model='other', model='m')
    for given, student, teacher, message in (
        ({}, config(experts=0), None, 'm has no routed experts'),
        ({}, config(), config(layers=3), "the student has {'layers': 2, 'experts': 4} and the teacher {'layers': 3"),
        (dict(gkd_teacher_engine='vllm', gkd_logits_topk=4), config(), None, 'an engine does not say'),
        (dict(teacher_tensor_model_parallel_size=2), config(), config(), '--teacher_tensor_model_parallel_size 2: in a layout of its own'),
    ):
        with pytest.raises(OptionError, match=f'^--gkd_routing teacher.*{message}[^\n]*$'):
            check_routing(options(**taught, **given), student, teacher)
    check_routing(options(**taught), config(), config())
    check_routing(options(), config(experts=0), None)


def test_overrides_that_need_no_groups():
    for given in (None, {'cp_comm_type': 'all_gather'}, {'cp_comm_type': ['p2p', 'a2a']}):
        check_overrides(options(megatron_extra_kwargs=given))


LABELS = """
from types import SimpleNamespace
import torch
import swift.megatron
from swift_gkd_plugin.divergence import Divergence
from swift_gkd_plugin.megatron import loss
from swift_gkd_plugin.step.objective import LossOptions
from swift_gkd_plugin.teachers import HiddenStates

given, ones = [], torch.ones(3)
loss.linear_divergence = lambda *args, **extra: given.append(extra)
loss.mpu.get_tensor_model_parallel_world_size = lambda: 1
head = SimpleNamespace(tensors=lambda *adapter: SimpleNamespace(weight=torch.ones(5, 2), bias=None, transform=None))
batch = SimpleNamespace(labels=ones.long(), weights=ones, imitated=ones, advantages=None, compared=None)
view = SimpleNamespace(of=lambda x: x)
signal = HiddenStates(torch.ones(3, 2), head)
for alpha, signal in (0.0, signal), (0.5, signal), (0.5, None):
    options = LossOptions(Divergence(), 1.0, alpha, 'bucket', 5)
    loss.DistillationLoss(options, head)._sum(torch.ones(3, 2), batch, view, signal, None)
assert [extra['label_weights'] is None for extra in given] == [True, False, False]
assert all(extra['labels'] is not None for extra in given)
"""


def in_process(script: str, directory: Path) -> None:
    """That has Megatron-SWIFT in it."""
    (directory / 'script.py').write_text(script)
    status, output = starts.run(directory / 'script.py', modules=runs.MODULES, env=runs.CPU, cwd=directory, timeout=120)
    assert status == 0, output[-3000:]


def test_no_gradient_of_a_cross_entropy_that_nobody_asked_for(tmp_path):
    """The labels are there all the same, for the cross-entropy that is logged."""
    in_process(LABELS, tmp_path)


TOPK = """
from types import SimpleNamespace
import torch
import swift.megatron
from swift_gkd_plugin.divergence import LogitTransform
from swift_gkd_plugin.megatron import teachers
from swift_gkd_plugin.megatron.head import HeadTensors
from swift_gkd_plugin.teachers import TopKOptions

teachers.mpu.get_tensor_model_parallel_group = lambda: None
teachers.mpu.get_tensor_model_parallel_world_size = lambda: 1
teachers.mpu.get_tensor_model_parallel_rank = lambda: 0
torch.manual_seed(0)
hidden, weight = torch.randn(50, 64).bfloat16(), torch.randn(400, 64).bfloat16()
teacher = object.__new__(teachers.LocalTeacher)
teacher.loss_head = SimpleNamespace(tensors=lambda adapter: HeadTensors(weight, None, LogitTransform(0.5, 8.0)))
with torch.no_grad():
    signal = teacher._reduced(hidden, TopKOptions(8, 0.9, 390))
logits = (hidden.double() @ weight.double().T)[:, :390]
exact = (8 * torch.tanh(0.5 * logits / 8)).div(0.9).log_softmax(-1)
torch.testing.assert_close(signal.logprobs.double(), exact.gather(-1, signal.ids), rtol=0, atol=2e-5)
torch.testing.assert_close(signal.logprobs.double(), exact.topk(8).values, rtol=0, atol=2e-5)
"""


def test_top_k_of_half_precision_weights_is_that_of_exact_logits(tmp_path):
    """Logits rounded to bf16 would be off by 0.14 here."""
    in_process(TOPK, tmp_path)
