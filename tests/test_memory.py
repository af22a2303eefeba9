"""The memory model: counts of published models, what is there at the same time, what is said when it does not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.hf import memory as hf
from swift_gkd_plugin.megatron import memory as megatron
from swift_gkd_plugin.megatron.options import SIZES
from swift_gkd_plugin.memory import verdict
from swift_gkd_plugin.memory.estimates import Rows, activation_bytes, cache_bytes
from swift_gkd_plugin.memory.layout import Layout, parameters
from swift_gkd_plugin.memory.setup import Engines
from swift_gkd_plugin.memory.sizes import ModelSize
from swift_gkd_plugin.memory.table import GENERATION, STUDENT, TEACHER, UPDATE, Part, Table
from swift_gkd_plugin.memory.verdict import Card

GIB = 2**30


def qwen3(hidden, layers, heads, ffn, tied=False):
    shape = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn)
    return Qwen3Config(**shape, num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=tied)


# Parameters as their publisher counts them: the sizes of the checkpoints over two bytes.
PUBLISHED = {
    'Qwen3-0.6B': (qwen3(1024, 28, 16, 3072, tied=True), 596_049_920),
    'Qwen3-8B': (qwen3(4096, 36, 32, 12288), 8_190_735_360),
    'Qwen3-32B': (qwen3(5120, 64, 64, 25600), 32_762_123_264),
    'Qwen3-30B-A3B': (
        Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            tie_word_embeddings=False,
        ),
        30_532_122_624,
    ),
}


def empty(config):
    with torch.device('meta'):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture(scope='module')
def sizes():
    return {name: ModelSize.of(empty(config)) for name, (config, _) in PUBLISHED.items()}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_are_counted_exactly(sizes, name):
    count = PUBLISHED[name][1]
    assert sum(w.numbers for w in sizes[name].weights) == count
    assert sizes[name].bytes == 2 * count


def test_an_adapter_is_counted_exactly():
    model = get_peft_model(empty(PUBLISHED['Qwen3-8B'][0]), LoraConfig(r=8, target_modules=['q_proj', 'v_proj']))
    size = ModelSize.of(model)
    per_layer = 8 * (4096 + 4096) + 8 * (4096 + 1024)
    assert sum(w.numbers for w in size.trained) == 36 * per_layer
    assert size.inside.itemsize == 2  # of what passes through, though PEFT keeps the adapter in fp32
    assert not size.head_is_trained
    every_linear = 4096 + 4096 + 2 * (4096 + 1024) + 4096 + 4096 + 3 * (4096 + 12288)
    assert ModelSize.of(empty(PUBLISHED['Qwen3-8B'][0])).low_rank(8) == 8 * 36 * every_linear


def test_an_embedding_is_no_layer(sizes):
    size = sizes['Qwen3-8B']
    assert {w.layer for w in size.weights} == {None, *range(36)}
    assert size.largest_layer == 151936 * 4096
    # What --gkd_teacher_offload layer leaves on the device: both tables and the last norm; what comes are two layers.
    stays = sum(w.bytes for w in size.weights if w.name not in size.streamed)
    assert stays == 2 * (2 * 151936 * 4096 + 4096)
    assert size.buffer == (size.bytes - stays) / 36


ROWS = Rows(rows=2, length=2048, trained=1024, micro_batches=4, answers=0, answers_of_teacher=False, budget=None)


# Full training of 8B on 8 ranks by a teacher of 32B: what both back ends know of it, and what each of them does.
COMMON = dict(rows=ROWS, averaged=False, scores=True, offload=None, topk=None, extrapolates=False, engines=Engines(), card=None)
TRANSFORMERS = COMMON | dict(
    world=8,
    sharding=hf.DDP,
    zero={},
    moments=2,
    mixed=True,
    checkpointing=True,
    bits=None,
    teacher_bits=None,
    adapter=None,
    teacher_sharded=False,
    teacher_on_host=False,
    placed=False,
    teacher_rows=None,
    gathers=True,
    rewards=(),
    sure_rewards=True,
    away=(),
    sure=True,
)
MEGATRON = COMMON | dict(
    layout=Layout(8),
    own=Layout(8),
    gradient=4,
    state=12,
    distributed=True,
    rank=None,
    recomputed=(1.0, 1),
    sequence_parallel=False,
    offload=True,
    lends=True,
    moves=None,
    away=(False, False),
    even=True,
    sure_trained=True,
    sure_state=True,
)


def setup(sizes, teacher='Qwen3-32B', **given) -> hf.Setup:
    alone = dict(in_student=teacher is None, each_micro_batch=teacher is None)
    return hf.Setup(**TRANSFORMERS | dict(student=sizes['Qwen3-8B'], teacher=teacher and sizes[teacher]) | alone | given)


def megatron_setup(sizes, **given) -> megatron.Setup:
    return megatron.Setup(**MEGATRON | dict(student=sizes['Qwen3-8B'], teacher=sizes['Qwen3-32B']) | given)


def exact(table: Table) -> dict[str, int]:
    return {part.name: part.bytes for part in table.parts if part.exact}


P, T = PUBLISHED['Qwen3-8B'][1], PUBLISHED['Qwen3-32B'][1]
SHARDED = dict(sharding=hf.ZERO3, zero={'stage': 3}, teacher_sharded=True)


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        # AdamW's moments have the dtype of the weights; DDP's buckets are a second copy of the gradients.
        (
            {},
            {
                **dict.fromkeys(('student weights', 'gradients', "gradients in DDP's buckets"), 2 * P),
                'optimizer': 4 * P,
                'teacher weights': 2 * T,
            },
        ),
        (
            dict(sharding=hf.ZERO2, zero={'stage': 2}),
            {'student weights': 2 * P, 'gradients': P / 4, 'optimizer': 12 * P / 8, 'teacher weights': 2 * T},
        ),
        (SHARDED, {'student weights': P / 4, 'gradients': P / 4, 'optimizer': 12 * P / 8, 'teacher weights': T / 4}),
        (
            dict(sharding=hf.FSDP2, teacher_sharded=True),
            {
                **{'student weights': P / 2, 'gradients': P / 2, 'optimizer': P, 'teacher weights': T / 4},
                "teacher weights, FSDP2's whole head": 2 * (151936 * 5120 + 5120),
            },
        ),
        (
            dict(sharding=hf.ZERO3, zero={'stage': 3, 'offload_optimizer': {'device': 'cpu'}, 'offload_param': {'device': 'cpu'}}),
            {'teacher weights': 2 * T},
        ),
        (
            dict(sharding=hf.WHOLE, moments=0, teacher=None),
            {'student weights': 2 * P, 'gradients': 2 * P},
        ),
    ],
    ids=['ddp', 'zero2', 'zero3', 'fsdp2', 'zero3 offload', 'sgd alone'],
)
def test_who_holds_what(sizes, given, expected):
    assert exact(hf.table(setup(sizes, **given))) == pytest.approx(expected)


def test_an_offloaded_teacher_is_there_when_it_looks(sizes):
    whole, offloaded, layers = (hf.table(setup(sizes, offload=how)) for how in (None, 'model', 'layer'))
    away = 2 * T - 2 * 151936 * 5120
    assert whole.held(STUDENT, True) - offloaded.held(STUDENT, True) == away
    assert whole.held(TEACHER, True) == offloaded.held(TEACHER, True)
    assert offloaded.held(TEACHER, True) - layers.held(TEACHER, True) == pytest.approx(2 * T * 62 / 64, rel=0.1)


def test_gradients_and_optimizer_make_room_for_a_visit(sizes):
    there = megatron.table(megatron_setup(sizes, lends=False, moves=True))  # as with --optimizer_cuda_graph
    lent, both = (megatron.table(megatron_setup(sizes, moves=moves)) for moves in (False, True))
    assert there.held(TEACHER, True) - lent.held(TEACHER, True) == 4 * P
    assert lent.held(TEACHER, True) - both.held(TEACHER, True) == 12 * P / 8
    assert there.held(STUDENT) == lent.held(STUDENT) == both.held(STUDENT)


def test_the_optimizer_leaves_if_it_has_to(sizes):
    full = megatron.table(megatron_setup(sizes)).held(TEACHER)  # no card, nothing to compare it with
    for size, leaves in ((full, False), (full - 1, True)):
        found = megatron_setup(sizes, card=Card('cuda:0', size))
        assert megatron.optimizer_leaves(found) == leaves
        assert megatron.table(found).held(TEACHER) == full - leaves * 12 * P / 8
        assert not megatron.optimizer_leaves(replace(found, moves=False))
        assert not megatron.optimizer_leaves(replace(found, lends=False, moves=True))


def test_an_answering_teacher_has_their_room_too(sizes):
    """What it takes of the card beyond that is all that is added to what there is while the student answers."""
    answering = megatron_setup(sizes, scores=False, rows=replace(ROWS, answers=4, answers_of_teacher=True))
    visits = [
        {part.name: part.bytes for part in megatron.table(replace(answering, moves=moves)).parts}['teacher weights, visiting to answer']
        for moves in (False, True)
    ]
    head = 2 * 151936 * 5120
    assert visits == [2 * T - head - 4 * P, 2 * T - head - 4 * P - 12 * P / 8]
    full = megatron.table(answering).held(GENERATION)
    assert megatron.optimizer_leaves(replace(answering, card=Card('cuda:0', full - 1)))
    # Keys and values of the student's alone: nothing would be gained.
    alone = replace(answering, rows=replace(answering.rows, answers_of_teacher=False), card=Card('cuda:0', 1))
    assert not megatron.optimizer_leaves(alone)


def test_what_the_reference_leaves_waits_for_the_student(sizes):
    """In bf16: of a micro-batch, or in Megatron, where it looks at a step, of that."""
    for found, tokens in (
        (hf.table(setup(sizes, extrapolates=True)), 2048),
        (megatron.table(megatron_setup(sizes, extrapolates=True)), 8192),
    ):
        (part,) = (part for part in found.parts if part.name == 'what the reference leaves')
        assert part.bytes == 2 * 4096 * tokens and STUDENT in part.phases


def test_the_peak_is_no_sum():
    table = Table((Part('a', 5, (TEACHER,)), Part('b', 4, (STUDENT,)), Part('c', 2), Part('d', 3, (STUDENT,), exact=False)))
    assert (table.peak(), table.fullest()) == (9, STUDENT)
    assert (table.peak(exact_only=True), table.fullest(exact_only=True)) == (7, TEACHER)


def test_zero3_brings_the_student_together_to_generate(sizes):
    answering = replace(ROWS, answers=8)
    found = hf.table(setup(sizes, **SHARDED, rows=answering))
    assert GENERATION in found.phases and found.held(GENERATION, True) > 2 * P
    apart = hf.table(setup(sizes, **SHARDED, rows=answering, gathers=False))
    assert found.held(GENERATION, True) - apart.held(GENERATION, True) == 2 * P


def test_reward_models_are_whole_on_each_rank(sizes):
    judged = {'rewards': (sizes['Qwen3-8B'],), 'rows': replace(ROWS, answers=8)}
    for sharded in ({}, SHARDED):
        with_, without = (hf.table(setup(sizes, **sharded, **how)) for how in (judged, judged | {'rewards': ()}))
        assert all(with_.held(phase, True) - without.held(phase, True) == 2 * P for phase in with_.phases)
        assert with_.held(GENERATION) - without.held(GENERATION) > 2 * P == with_.held(UPDATE) - without.held(UPDATE)
        assert hf.table(setup(sizes, **sharded, **judged, sure_rewards=False)).held(UPDATE, True) == without.held(UPDATE, True)


def test_the_cache_is_what_is_generated_or_the_budget():
    assert cache_bytes(1024, answers=4, length=100, budget=None) == 4 * 100 * 1024
    assert cache_bytes(1024, answers=4, length=100, budget=250) == 250 * 1024
    assert cache_bytes(1024, answers=4, length=100, budget=1) == 100 * 1024  # a row is answered in any case
    assert cache_bytes(None, answers=4, length=100, budget=None) == 0


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_about_what_autograd_saves(dtype, checkpointing):
    config = Qwen3Config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
        intermediate_size=384,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation='sdpa').train()
    if checkpointing:
        model.gradient_checkpointing_enable({'use_reentrant': False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens, layers = 256, 4
    inside = ModelSize.of(model).inside
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.model(torch.randint(0, 64, (1, tokens))).last_hidden_state
    held = sum(size for size, _ in saved.values())
    estimate = activation_bytes(inside, tokens, layers if checkpointing else 0, 0 if checkpointing else layers)
    rest = (4 + inside.itemsize) * 128 * tokens  # the last norm
    assert held == pytest.approx(estimate + rest, rel=0.15)
    assert states.requires_grad


@pytest.mark.parametrize('name', ['Qwen3-0.6B', 'Qwen3-8B', 'Qwen3-30B-A3B'])
def test_stages_and_experts_add_up_to_the_model(sizes, name):
    size, tied = sizes[name], name == 'Qwen3-0.6B'
    total = PUBLISHED[name][1]
    assert sum(parameters(size, Layout(1), 0)) == total
    stages = [parameters(size, Layout(4, pp=2), stage) for stage in (0, 1)]
    assert sum(map(sum, stages)) == total + tied * 151936 * 1024  # both stages have a tied table
    dense, expert = parameters(size, Layout(8, ep=8), 0)
    assert dense + 8 * expert == total
    split, expert = parameters(size, Layout(4, tp=4), 0)
    whole = sum(w.numbers for w in size.weights if len(w.shape) == 1 or w.name.endswith('mlp.gate.weight'))
    assert 4 * split - 3 * whole + expert == total


# --- what is said ---


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(verdict, 'logger', logging.getLogger('memory'))
    caplog.set_level('INFO', 'memory')
    return caplog


ARGS = type('Args', (), {'fsdp': None, 'tuner_type': 'full', 'lora_rank': 8})


def announced(setup):
    verdict.announce(setup, hf.table, hf.changes(setup, ARGS), setup.card)


def test_the_table_is_said(sizes, said):
    announced(setup(sizes))
    text = said.messages[-1]
    assert 'student weights                           15.3        15.3        15.3\n' in text
    assert 'optimizer                                 30.5        30.5        30.5\n' in text
    assert text.splitlines()[1].split() == ['GiB', '(~:', 'estimated)', 'teacher', 'student', 'update']
    assert not [record for record in said.records if record.levelname == 'WARNING']


def test_what_cannot_fit_is_refused_with_what_would(sizes, said):
    with pytest.raises(OptionError) as refused:
        announced(setup(sizes, card=Card('cuda:0', 80 * GIB)))
    message = str(refused.value)
    assert '\n' not in message
    held = 2 * T + 10 * P
    assert f'a rank holds {held / GIB:.1f} GiB at least (teacher weights 61.0 GiB, optimizer 30.5 GiB' in message
    assert 'and cuda:0 has 80.0 GiB; it fits with --deepspeed zero3 (' in message


def test_a_kept_optimizer_is_named_where_it_would_help(sizes, said):
    given = dict.fromkeys((f'teacher_{name}' for name in SIZES), None) | dict(tuner_type='full', lora_rank=8, optimizer_cuda_graph=False)
    kept = megatron_setup(sizes, moves=False, card=Card('cuda:0', 80 * GIB))
    with pytest.raises(OptionError, match=r'; it fits with --gkd_optimizer_offload true \(78.1 GiB\) or '):
        verdict.announce(kept, megatron.table, megatron.changes(kept, SimpleNamespace(**given)), kept.card)


def test_options_that_only_help_together(sizes, said):
    alone = setup(sizes, world=1, sharding=hf.WHOLE, card=Card('cuda:0', 32 * GIB))
    with pytest.raises(OptionError, match=r'it fits with --\S+( \w+)* and --.*\(\d+\.\d GiB\)\.$'):
        announced(alone)
    with pytest.raises(OptionError, match=r'more or larger cards are needed, .*\(.*come nearest: '):
        announced(replace(alone, card=Card('cuda:0', 8 * GIB)))


def test_an_estimate_refuses_nothing(sizes, said):
    """Its exact parts would fit: a warning, and the run goes on."""
    long = setup(sizes, **SHARDED, checkpointing=False, rows=replace(ROWS, length=8192))
    long = replace(long, card=Card('cuda:0', 80 * GIB))
    sure, all_told = hf.table(long).peak(exact_only=True), hf.table(long).peak()
    assert sure < 80 * GIB < all_told
    announced(long)
    (warning,) = [record.message for record in said.records if record.levelname == 'WARNING']
    assert 'should it run out of memory: it fits with --gradient_checkpointing true (' in warning and '\n' not in warning
    said.clear()
    announced(replace(long, card=Card('cuda:0', all_told)))
    assert not [record for record in said.records if record.levelname == 'WARNING']


def test_a_share_of_the_card_is_vllms(sizes, said):
    answering = setup(sizes, **SHARDED, engines=Engines(0.5), card=Card('cuda:0', 80 * GIB))
    found = hf.table(answering)
    asleep = hf.table(replace(answering, engines=Engines(0.5, sleeps=True)))
    assert found.held(STUDENT) - asleep.held(STUDENT) == 40 * GIB and 'vLLM' not in exact(found)
    assert asleep.held(GENERATION) == found.held(GENERATION)


def test_who_answers_in_turn_is_there_in_turn(sizes):
    """The student's engine is asleep, and a student that was brought together is spread again, when the teacher comes to answer."""
    answered = {**SHARDED, 'rows': replace(ROWS, answers=4, answers_of_teacher=True), 'offload': 'model', 'card': Card('cuda:0', 80 * GIB)}
    whole = 2 * sum(weight.numbers for weight in setup(sizes, **answered).student.weights)
    for more, left in (
        ({'gathers': False}, 0),
        ({'gathers': False, 'engines': Engines(0.01, sleeps=True)}, int(0.8 * GIB)),
        ({'gathers': False, 'engines': Engines(0.01)}, 0),
        ({'gathers': True}, whole),
    ):
        parts = {part.name: part for part in hf.table(setup(sizes, **answered | more)).parts}
        visit, again = parts['teacher weights, visiting'], parts.get('teacher weights, visiting to answer')
        assert visit.exact and visit.phases == (TEACHER,)
        assert (again.bytes if again else 0) == max(visit.bytes - left, 0) and (again is None or not again.exact)


def test_a_model_that_cannot_be_counted_ends_no_run(said):
    def fails():
        raise NotImplementedError('aten::svd')

    verdict.foretell(fails, hf.table, dict)
    assert said.messages == ['Memory is not foretold, for the models cannot be counted: NotImplementedError: aten::svd']


def test_counting_draws_no_random_number():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with verdict.apart():
        get_peft_model(empty(PUBLISHED['Qwen3-0.6B'][0]), LoraConfig(r=8, target_modules=['q_proj']))
    assert torch.rand(1) == expected
