"""Output heads: what families of models do to their logits, found out and reproduced; logits of half-precision models."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import Places, spread
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from swift_gkd_plugin.divergence import Divergence, LogitTransform, TokenStats
from swift_gkd_plugin.hf import loss as loss_module
from swift_gkd_plugin.hf.head import POST_PROCESSING, HeadTensors, OutputHead
from swift_gkd_plugin.hf.loss import DistillationLoss
from swift_gkd_plugin.hf.teachers import LocalTeacher, TopKOptions
from swift_gkd_plugin.step import objective
from swift_gkd_plugin.step.objective import LossOptions
from swift_gkd_plugin.step.samples import MicroBatch
from swift_gkd_plugin.teachers import HiddenStates

VOCABULARY = 96
SIZES = {
    'vocab_size': VOCABULARY,
    'hidden_size': 32,
    'intermediate_size': 64,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'head_dim': 16,
    'pad_token_id': 0,
    'bos_token_id': None,
    'eos_token_id': 1,
    'initializer_range': 0.05,
}
CAPPED = LogitTransform(softcap=2.0)
EXPERTS = {'num_local_experts': 2, 'num_experts_per_tok': 1}
MAMBA = {'mamba_n_heads': 4, 'mamba_d_head': 16, 'mamba_d_state': 8, 'mamba_n_groups': 1, 'mamba_chunk_size': 8}
MLA = {'kv_lora_rank': 16, 'q_lora_rank': 16, 'qk_nope_head_dim': 8, 'qk_rope_head_dim': 8, 'v_head_dim': 16}
# model_type: its options, and what has to come of them
FAMILIES = {
    'qwen3': ({}, None),
    'gemma2': ({'final_logit_softcapping': 2.0}, CAPPED),
    'gemma3_text': ({'final_logit_softcapping': 2.0}, CAPPED),
    'gemma4_text': ({'final_logit_softcapping': 2.0, 'hidden_size_per_layer_input': 8, 'vocab_size_per_layer_input': VOCABULARY}, CAPPED),
    'vaultgemma': ({'final_logit_softcapping': 2.0}, CAPPED),
    'nanochat': ({'final_logit_softcapping': 2.0}, CAPPED),
    'recurrent_gemma': ({'logits_soft_cap': 2.0, 'block_types': ['recurrent', 'attention']}, CAPPED),
    'muse_glimmer': ({'output_multiplier': 0.5, 'final_logit_softcapping': 2.0}, LogitTransform(0.5, 2.0)),
    'cohere': ({'logit_scale': 0.25}, LogitTransform(0.25)),
    'cohere2': ({'logit_scale': 0.25}, LogitTransform(0.25)),
    'granite': ({'logits_scaling': 4.0}, LogitTransform(0.25)),
    'granitemoe': ({'logits_scaling': 4.0, **EXPERTS}, LogitTransform(0.25)),
    'granitemoehybrid': (
        {'logits_scaling': 4.0, 'layer_types': ['mamba', 'attention'], 'shared_intermediate_size': 64, **EXPERTS, **MAMBA},
        LogitTransform(0.25),
    ),
    'hyperclovax': ({'logits_scaling': 4.0}, LogitTransform(4.0)),
    'minicpm3': ({'dim_model_base': 8, **MLA}, None),
    'falcon_h1': ({'lm_head_multiplier': 4.0, 'mamba_d_ssm': 64, **MAMBA}, LogitTransform(4.0)),
}


def tiny(family: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    options = {**SIZES, **FAMILIES[family][0]}
    if family == 'muse_glimmer':
        from transformers import MuseGlimmerForConditionalGeneration

        vision = {'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 1}
        config = AutoConfig.for_model(family, text_config=options, vision_config=vision, out_hidden_size=16, projector_hidden_size=16)
        return MuseGlimmerForConditionalGeneration(config).train()
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).train()


@pytest.fixture
def batch() -> MicroBatch:
    torch.manual_seed(0)
    index = torch.tensor([3, 4, 5, 9, 10, 17])
    ids = torch.randint(2, VOCABULARY, (2, 9))
    ones = torch.ones(len(index))
    return MicroBatch(
        samples=[],
        student_inputs={'input_ids': ids, 'attention_mask': torch.ones_like(ids)},
        teacher_inputs=None,
        student_index=index,
        teacher_index=index,
        labels=torch.randint(2, VOCABULARY, (len(index),)),
        weights=ones,
        imitated=ones,
        lengths=[3, 3],
    )


def verified(model, batch) -> str | None:
    with torch.no_grad():
        return OutputHead(model.eval()).verify(lambda: model(**batch.student_inputs), torch.arange(0, 18, 3))


def loss_and_gradient(student, teacher, batch, dense: bool):
    student, teacher = copy.deepcopy(student).eval(), LocalTeacher(teacher, teacher)
    options = LossOptions(Divergence('jsd', 0.5, 0.9), 1.0, 0.5, 'bucket', None)
    loss = DistillationLoss(options, OutputHead(student))
    if dense:
        loss.head.dense = teacher.head.dense = 'the test wants it'
    (signal,) = teacher.signals([batch], lambda model, inputs: model(**inputs))
    total, _ = loss(lambda inputs: student(**inputs), batch, signal, TokenStats())
    total.backward()
    return total.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('family', FAMILIES)
def test_family(family, batch, gradient_difference):
    student, teacher = tiny(family, 1), tiny(family, 2)
    assert verified(student, batch) is None
    assert OutputHead(student).tensors().transform == FAMILIES[family][1]
    loss, gradient = loss_and_gradient(student, teacher, batch, dense=False)
    dense_loss, dense_gradient = loss_and_gradient(student, teacher, batch, dense=True)
    assert loss == pytest.approx(dense_loss, rel=1e-5)
    assert gradient_difference(gradient, dense_gradient) < 1e-5


@pytest.mark.parametrize('alpha, taught, weighed', [(0.0, True, False), (0.5, True, True), (0.5, False, True)])
def test_no_gradient_of_a_cross_entropy_that_nobody_asked_for(batch, monkeypatch, alpha, taught, weighed):
    """The labels are there all the same, for the cross-entropy that is logged."""
    student, teacher = tiny('qwen3', 1).eval(), tiny('qwen3', 2).eval()
    teacher = LocalTeacher(teacher, teacher)
    signal = teacher.signals([batch], lambda model, inputs: model(**inputs))[0] if taught else None
    given = []
    operator = loss_module.linear_divergence
    monkeypatch.setattr(loss_module, 'linear_divergence', lambda *args, **extra: given.append(extra) or operator(*args, **extra))
    stats = TokenStats()
    loss = DistillationLoss(LossOptions(Divergence(), 1.0, alpha, 'bucket', None), OutputHead(student))
    total, _ = loss(lambda inputs: student(**inputs), batch, signal, stats)
    assert (given[0]['label_weights'] is not None) == weighed and given[0]['labels'] is not None
    logits = student(**batch.student_inputs).logits.flatten(0, 1)[batch.student_index]
    assert torch.allclose(stats.cross_entropy, torch.nn.functional.cross_entropy(logits, batch.labels, reduction='none'), rtol=1e-4)
    divergence = 0 if stats.divergence is None else stats.divergence.sum()
    assert torch.allclose(total, divergence + alpha * stats.cross_entropy.sum(), rtol=1e-5)


@pytest.mark.parametrize('k', [None, 8])
def test_fp32_weights_under_autocast(batch, monkeypatch, gradient_difference, k):
    """Products of the heads take hidden states in autocast's dtype, to which the operator rounds the weights; gradients stay fp32."""
    name = 'linear_divergence' if k is None else 'topk_divergence'
    module = loss_module if k is None else objective
    given = []
    operator = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **extra: given.append((*args, extra)) or operator(*args, **extra))

    def run(weights: torch.dtype):
        student, bare = (tiny('qwen3', seed).eval().to(weights) for seed in (1, 2))
        teacher = LocalTeacher(bare, bare)
        loss = DistillationLoss(LossOptions(Divergence('jsd', 0.5, 0.9), 1.0, 0.5, 'bucket', None), OutputHead(student))

        def forward(model, inputs):
            with torch.autocast('cpu', torch.bfloat16):
                outputs = model(**inputs)
            outputs.logits = outputs.logits.float()  # as accelerate has it
            return outputs

        assert loss.head.verify(lambda: forward(student, batch.student_inputs), torch.arange(0, 18, 3)) is None
        (signal,) = teacher.signals([batch], forward, k and TopKOptions(k, 0.9, None))
        total, _ = loss(lambda inputs: forward(student, inputs), batch, signal, TokenStats())
        total.backward()
        return total.item(), signal, {name: p.grad for name, p in student.named_parameters()}

    loss, signal, gradient = run(torch.float32)
    assert given[0][0].dtype == torch.bfloat16 and given[0][1].dtype == torch.float32
    assert k or signal.hidden.dtype == given[0][2].dtype == torch.bfloat16
    assert {g.dtype for g in gradient.values()} == {torch.float32}
    expected, _, right = run(torch.bfloat16)
    assert loss == pytest.approx(expected, rel=2e-2) and gradient_difference(gradient, right) < 5e-2


def test_compiled_models_are_not_compiled_again(batch):
    """--torch_compile: once for each model, and once more for lengths that vary; the head is left to the loss."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, losses = CompileCounterWithBackend('eager'), []
    torch.compiler.reset()
    student, bare = (tiny('qwen3', seed).eval() for seed in (1, 2))
    for model in (student, bare):
        model.model.layers = model.model.layers[:1]
    teacher, head = LocalTeacher(torch.compile(bare, backend=counter), bare), OutputHead(student)
    loss = DistillationLoss(LossOptions(Divergence('jsd', 0.5, 0.9), 1.0, 0.5, 'bucket', None), head)
    compiled = torch.compile(student, backend=counter)
    frames = []
    for step in range(6):
        padding = torch.zeros(2, step, dtype=torch.int64)
        inputs = {name: torch.cat([value, padding], 1) for name, value in batch.student_inputs.items()}
        index = torch.tensor([3, 4, 5, 9 + step, 10 + step, 17 + step])
        longer = dataclasses.replace(batch, student_inputs=inputs, student_index=index, teacher_index=index)
        (signal,) = teacher.signals([longer], lambda model, inputs: model(**inputs))
        for model in (compiled, student):
            total, _ = loss(lambda inputs, model=model: model(**inputs), longer, signal, TokenStats())
            losses.append(total.item())
        frames.append(counter.frame_count)
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-6)
    assert 0 < frames[0] < frames[1] == frames[-1], frames


@pytest.mark.parametrize('language', ['en', 'zh'])
def test_the_list_is_in_the_documentation(language):
    text = Path(__file__).parents[2].joinpath(f'docs_{language}', 'loss.md').read_text()
    for item in POST_PROCESSING:
        assert f'`{item.attribute}`' in text, item.attribute
        for family in (*item.only, *item.never):
            assert f'`{family.removesuffix("_text")}`' in text, family


class Toy(Qwen3ForCausalLM):
    """A family that nobody knows."""

    change = staticmethod(lambda logits: logits)

    def forward(self, **inputs):
        return SimpleNamespace(logits=self.change(super().forward(**inputs).logits))


UNKNOWN = {
    'scale': lambda logits: logits * 1.1,
    'soft cap': lambda logits: 300 * torch.tanh(logits / 300),  # bends a logit of 10 by 0.04 %
    'bias': lambda logits: logits + torch.arange(VOCABULARY) / VOCABULARY,
    'masked': lambda logits: logits.masked_fill(torch.arange(VOCABULARY) > 90, -torch.inf),
    'fewer': lambda logits: logits[..., :90],
}


@pytest.mark.parametrize('name', UNKNOWN)
def test_an_unknown_family_is_found_out(name, batch):
    torch.manual_seed(0)
    model = Toy(Qwen3Config(**SIZES))
    assert verified(model, batch) is None
    model.change = UNKNOWN[name]
    assert verified(model, batch)


def test_a_scale_that_stays_on_is_found_out(batch):
    torch.manual_seed(0)
    model = Toy(Qwen3Config(**SIZES))
    model.config.logits_scaling = 4.0
    model.change = lambda logits: logits / 4.0  # like the list says, but not from the attribute
    assert 'switched off' in verified(model, batch)


def parts_of(model, outer: str, inner: str) -> dict[str, torch.device]:
    """The embedding and what is tied to it on one device, the layers on another."""
    head = outer if model.config.tie_word_embeddings else inner
    places = {'model.embed_tokens': outer, 'model.layers.0': outer, 'model.layers.1': inner, 'model.norm': inner, 'lm_head': head}
    return {name: torch.device(place) for name, place in {**places, 'model.rotary_emb': outer}.items()}


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kind', ['hidden states', 'top-k', 'whole logits', "the teacher's whole logits", 'no teacher'])
def test_models_over_several_devices(batch, tied, kind, gradient_difference):
    """As under --device_map auto: the loss comes to the head, wherever hidden states, labels and what the teacher says are."""

    def run(places: Places | None):
        torch.manual_seed(1)
        config = Qwen3Config(**SIZES, tie_word_embeddings=tied)
        student, bare = (Qwen3ForCausalLM(config).eval() for _ in range(2))
        here = batch
        with places or nullcontext():
            if places:
                spread(student, parts_of(student, 'cpu:1', 'cpu:2'))
                spread(bare, parts_of(bare, 'cpu:2', 'cpu:3'))
                here = batch.to(torch.device('cpu:1'))
            teacher = LocalTeacher(bare, bare)
            loss = DistillationLoss(LossOptions(Divergence('jsd', 0.5, 0.9), 1.0, 0.5, 'bucket', None), OutputHead(student))
            for head, model in ((loss.head, student), (teacher.head, bare)):
                assert head.verify(lambda model=model: model(**here.student_inputs), torch.arange(0, 18, 3)) is None
            if kind == 'whole logits':
                loss.head.dense = teacher.head.dense = 'the test wants it'
            elif kind == "the teacher's whole logits":
                teacher.head.dense = 'the test wants it'
            topk = TopKOptions(8, 0.9, None) if kind == 'top-k' else None
            signal = None
            if kind != 'no teacher':
                (signal,) = teacher.signals([here], lambda model, inputs: model(**inputs), topk)
            total, _ = loss(lambda inputs: student(**inputs), here, signal, TokenStats())
        total.backward()
        return total.item(), {name: p.grad for name, p in student.named_parameters()}

    (loss, gradient), (expected, right) = run(Places()), run(None)
    assert loss == expected and gradient_difference(gradient, right) == 0


def exact(hidden, weight, bias, lora, transform):
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    if lora is not None:
        logits = logits + hidden.double() @ lora[0].double().t() @ lora[1].double().t() * lora[2]
    logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize('transform', [LogitTransform(), LogitTransform(0.25), LogitTransform(0.5, 8.0)])
@pytest.mark.parametrize('extras', [False, True])
def test_logits_are_not_rounded_to_the_type_of_the_model(dtype, transform, extras):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(64, 32).to(dtype), (0.4 * torch.randn(5000, 32)).to(dtype), torch.randn(5000).to(dtype)
    lora = (torch.randn(4, 32).to(dtype) / 6, torch.randn(5000, 4).to(dtype), 0.5)
    head = HeadTensors(weight, *((bias, transform, lora) if extras else (None, transform, None)))
    expected = exact(hidden, weight, head.bias, head.lora, transform)
    for logits in (head.logits(hidden), head.logits_with_gradient(hidden)):
        assert (torch.log_softmax(logits.double(), -1) - torch.log_softmax(expected, -1)).abs().max() < 1e-5

    teacher = LocalTeacher.__new__(LocalTeacher)
    teacher.head = SimpleNamespace(gathered=lambda adapter: nullcontext(), tensors=lambda adapter: head)
    topk = teacher._reduced(HiddenStates(hidden, None), TopKOptions(20, 0.7, 4900), chunk_tokens=10)
    reference = torch.log_softmax(expected[:, :4900] / 0.7, -1)
    assert (topk.logprobs - reference.gather(-1, topk.ids)).abs().max() < 1e-5
    assert (topk.logprobs - reference.topk(20, -1).values).abs().max() < 1e-5


def test_logits_of_minus_infinity_stay():
    head = HeadTensors(torch.randn(8, 4), torch.tensor([0.0] * 7 + [-torch.inf]), None)
    assert head.logits(torch.randn(3, 4))[:, 7].isneginf().all()
