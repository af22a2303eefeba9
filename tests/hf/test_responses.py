"""Generation by transformers: right tokens from a model in training, and randomness that belongs to the row."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from swift_gkd_plugin.responses import Prompt, SamplingOptions, budget
from swift_gkd_plugin.responses.local import LocalGenerator, evaluation_mode, inference_template

GREEDY = SamplingOptions(max_tokens=12, temperature=0)
PROMPTS = [{'messages': [{'role': 'user', 'content': text}]} for text in ('what is 1 plus 2 ?', '5', 'what is 31 plus 27 and one more ?')]


@pytest.fixture(scope='module')
def tiny(tiny_models):
    from swift.model import get_model_processor
    from swift.template import get_template, update_generation_config_eos_token

    model, processor = get_model_processor(str(tiny_models.student), model_type='qwen3', torch_dtype=torch.float32)
    template = get_template(processor, template_type='qwen3', max_length=128)
    template.set_mode('train')
    update_generation_config_eos_token(model.generation_config, template)
    return model, template


def generator(model, template, tokens=None):
    """Of responses to inputs of ``template.encode``."""
    answer = LocalGenerator(template, lambda: nullcontext(model), torch.device('cpu'), tokens=tokens)

    def generate(inputs, seeds, options):
        with inference_template(template):
            prompts = [Prompt(one, template.encode(one)) for one in inputs]
        return answer(prompts, seeds, options)

    return generate


@pytest.fixture
def generate(tiny):
    model, template = tiny
    return generator(model, template)


def decode_without_cache(model, template, prompt, limit):
    with template.generate_context():
        ids = template.encode(prompt)['input_ids']
    new = []
    for _ in range(limit):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        new.append(int(logits.argmax()))
        if (
            new[-1] in model.generation_config.eos_token_id
            if isinstance(model.generation_config.eos_token_id, list)
            else [model.generation_config.eos_token_id]
        ):
            break
    return new


@pytest.mark.parametrize('checkpointing', [False, True])
def test_greedy_equals_decoding_without_cache(tiny, generate, checkpointing):
    model, template = tiny
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.config.use_cache = False  # as ms-swift sets it for training
    try:
        responses = generate(PROMPTS, [0] * 3, GREEDY)
    finally:
        model.gradient_checkpointing_disable()
    assert model.training
    model.eval()
    assert [r.token_ids for r in responses] == [decode_without_cache(model, template, p, 12) for p in PROMPTS]


def test_a_response_does_not_depend_on_the_batch(generate):
    options = SamplingOptions(max_tokens=12, temperature=0.9)
    together = generate(PROMPTS, [11, 22, 33], options)
    alone = [generate([p], [s], options)[0] for p, s in zip(PROMPTS, (11, 22, 33), strict=True)]
    turned = generate(PROMPTS[::-1], [33, 22, 11], options)[::-1]
    assert together == alone == turned
    assert generate(PROMPTS, [11, 22, 34], options)[2] != together[2]


@pytest.mark.parametrize('rows', [1, 2, 3])
def test_prompts_that_do_not_fit_wait_and_are_answered_the_same(tiny, generate, rows):
    model, template = tiny
    options = SamplingOptions(max_tokens=12, temperature=0.9)
    prompts, seeds = PROMPTS + PROMPTS[:1], [11, 22, 33, 44]  # one of them twice
    with template.generate_context():
        longest = max(len(template.encode(prompt)['input_ids']) for prompt in prompts)
    tokens = rows * (longest + 12)
    seen = []

    def look(module, args, kwargs, output):
        seen.append((kwargs['input_ids'].shape, output.past_key_values.get_seq_length()))

    def answers(tokens: int):
        seen.clear()
        with model.register_forward_hook(look, with_kwargs=True):
            return generator(model, template, tokens)(prompts, seeds, options)

    together = generate(prompts, seeds, options)
    assert answers(tokens) == together
    assert seen[0][0] == (rows, longest)
    assert max(shape[0] * held for shape, held in seen) <= tokens
    assert answers(1) == together  # too little for any
    assert [shape[0] for shape, _ in seen] == [1] * len(seen)


def test_waves():
    torch.manual_seed(0)
    lengths = torch.randint(1, 9000, (300,)).tolist()
    parts = budget.waves(lengths, 500, 40000)
    assert sorted(number for part in parts for number in part) == list(range(300))
    longest = [max(lengths[number] for number in part) for part in parts]
    assert longest == sorted(longest, reverse=True)
    for part, most in zip(parts, longest, strict=True):
        assert len(part) * (most + 500) <= 40000 and len(part) * most <= budget.PASS_TOKENS
    for part, most in zip(parts[:-1], longest, strict=False):  # no room for one more
        assert (len(part) + 1) * (most + 500) > 40000 or (len(part) + 1) * most > budget.PASS_TOKENS
    assert budget.waves([3, 5], 500, 1) == [[1], [0]] and budget.waves([], 500, 1) == []


def test_default_budget_is_counted_in_bytes(tiny):
    from transformers import DeepseekV3Config, GPT2Config, MambaConfig, Qwen3VLConfig

    model, template = tiny
    with template.generate_context(), torch.no_grad():
        ids = torch.tensor([template.encode(PROMPTS[0])['input_ids']])
        cache = model(input_ids=ids, use_cache=True).past_key_values
    kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert budget.bytes_per_token(model) * ids.numel() == kept

    def of(config) -> int | None:
        return budget.bytes_per_token(SimpleNamespace(config=config, dtype=torch.bfloat16))

    assert of(Qwen3VLConfig(text_config=dict(num_hidden_layers=64, num_key_value_heads=8, head_dim=128))) == 64 * 8 * 128 * 2 * 2
    assert of(GPT2Config(n_layer=2, n_head=4, n_embd=64)) == 2 * 4 * 16 * 2 * 2
    assert of(DeepseekV3Config()) == 61 * 128 * (192 + 128) * 2  # transformers keeps what its latents become
    assert of(MambaConfig()) is None and budget.default_tokens(None) == 65536
    assert budget.default_tokens(of(Qwen3VLConfig(text_config=dict(num_hidden_layers=64, num_key_value_heads=8)))) == 32768


def test_sampling_leaves_the_global_generator_alone(generate):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(PROMPTS, [1, 2, 3], SamplingOptions(max_tokens=4))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    'options',
    [
        SamplingOptions(1, temperature=1.0),
        SamplingOptions(1, temperature=0.5),
        SamplingOptions(1, top_k=3),
        SamplingOptions(1, top_p=0.5),
        SamplingOptions(1, min_p=0.2),
    ],
)
def test_sampled_tokens_have_the_distribution_of_transformers(tiny, generate, options):
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model, template = tiny
    prompt, count = PROMPTS[0], 2000
    model.eval()
    tokens = Counter(r.token_ids[0] for r in generate([prompt] * count, list(range(count)), options))
    with template.generate_context(), torch.no_grad():
        scores = model(input_ids=torch.tensor([template.encode(prompt)['input_ids']])).logits[:, -1].float() / options.temperature
    if options.top_k > 0:
        scores = TopKLogitsWarper(options.top_k)(None, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(None, scores)
    if options.min_p > 0:
        scores = MinPLogitsWarper(options.min_p)(None, scores)
    probability = torch.softmax(scores[0], -1)
    assert all(probability[token] > 0 for token in tokens)
    # The sum of squared deviations over the expected one is about 1; 5 standard deviations of a binomial for each of the largest.
    for token in probability.topk(5).indices.tolist():
        p = probability[token].item()
        assert abs(tokens[token] / count - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1e-9


def test_the_end_is_cut_at_the_first_stop(tiny, generate, monkeypatch):
    model, _template = tiny
    first = generate(PROMPTS, [0] * 3, GREEDY)
    stop = first[0].token_ids[3]
    monkeypatch.setattr(model.generation_config, 'eos_token_id', [stop, model.config.eos_token_id])
    again = generate(PROMPTS, [0] * 3, GREEDY)
    assert again[0].token_ids == first[0].token_ids[: first[0].token_ids.index(stop) + 1] and again[0].finish_reason == 'stop'
    for before, after in zip(first[1:], again[1:], strict=True):
        cut = before.token_ids.index(stop) + 1 if stop in before.token_ids else len(before.token_ids)
        assert after.token_ids == before.token_ids[:cut]
    assert first[0].finish_reason == 'length' and len(first[0].token_ids) == 12


def test_the_length_limit_of_the_template_holds(tiny, generate):
    model, template = tiny
    long = {'messages': [{'role': 'user', 'content': 'what is 1 plus 2 ? ' * 8}]}
    template.truncation_strategy, template.max_length = 'left', 20
    try:
        (response,) = generate([long], [0], GREEDY)
        model.eval()
        assert response.token_ids == decode_without_cache(model, template, long, 12)
    finally:
        template.truncation_strategy, template.max_length = 'raise', 128


def test_modes_are_restored_after_an_exception(tiny):
    model, _ = tiny
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(m.training for m in model.modules())
        raise RuntimeError
    assert [m.training for m in model.modules()] == before
    model.eval()


def test_the_template_is_restored(tiny, generate):
    _, template = tiny
    before = template.mode, template.max_length, template.padding_free
    generate(PROMPTS, [0] * 3, GREEDY)
    assert (template.mode, template.max_length, template.padding_free) == before


@pytest.mark.parametrize('temperature', [0, 1])
def test_ids_that_the_other_model_lacks_are_not_sampled(generate, temperature):
    usual, within = (
        generate(PROMPTS, [1, 2, 3], SamplingOptions(max_tokens=12, temperature=temperature, vocab_size=vocab_size))
        for vocab_size in (None, 300)
    )
    assert max(max(response.token_ids) for response in usual) >= 300
    assert max(max(response.token_ids) for response in within) < 300
