"""Tiny models whose layers, heads, experts and vocabularies split over two ranks each way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import helpers
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 512


def make_models(directory: Path, tiny: helpers.TinyModels, head_dim: int = 16) -> dict[str, Path]:
    """Students and teachers with the tokenizer of the other tests. The same seeds give the same files.

    ``student`` and ``teacher`` have 4 layers; ``wide`` is a teacher with 24 more padding rows, so that its shards and the student's hold
    different tokens; ``eight`` is one with 8 heads; ``tied`` shares embedding and head, and its 511 rows are no multiple of 2; ``qwen2`` is
    a teacher of another family; ``moe`` and ``moe_teacher`` have 4 experts; ``capped`` and ``capped_teacher`` are meant to cap their
    logits, as Gemma does; ``adapter`` is a LoRA of ``student``, ``moe_adapter`` one of the attention of ``moe``, that have an effect: a
    fresh one would be drawn differently in each layout. ``teacher_adapter`` and ``moe_teacher_adapter`` are adapters of the teachers, and
    ``adapted`` and ``moe_adapted`` what comes of them, by PEFT and by hand.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny.student)
    common = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids('<|im_end|>'),
        pad_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=False,
        vocab_size=VOCAB,
    )
    qwen3 = dict(common, head_dim=head_dim)
    teacher = dict(hidden_size=64, intermediate_size=96)
    moe = dict(
        qwen3,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    )
    made = {
        'student': (Qwen3ForCausalLM, Qwen3Config, qwen3),
        'teacher': (Qwen3ForCausalLM, Qwen3Config, qwen3 | teacher),
        'wide': (Qwen3ForCausalLM, Qwen3Config, qwen3 | teacher | {'vocab_size': VOCAB + 24}),
        'tied': (Qwen3ForCausalLM, Qwen3Config, qwen3 | {'vocab_size': VOCAB - 1, 'tie_word_embeddings': True}),
        'qwen2': (Qwen2ForCausalLM, Qwen2Config, common | {'num_hidden_layers': 2}),
        'moe': (Qwen3MoeForCausalLM, Qwen3MoeConfig, moe),
        'moe_teacher': (Qwen3MoeForCausalLM, Qwen3MoeConfig, moe | {'hidden_size': 64}),
        'eight': (Qwen3ForCausalLM, Qwen3Config, qwen3 | teacher | {'num_attention_heads': 8}),
    }
    paths: dict[str, Path] = {}
    for seed, (name, (model, config, values)) in enumerate(made.items()):
        torch.manual_seed(seed)
        paths[name] = directory / name
        model(config(**values)).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    # The teacher's weights with a tokenizer in which two ids have changed places.
    paths['other_tokens'] = directory / 'other_tokens'
    shutil.copytree(paths['teacher'], paths['other_tokens'])
    stored = json.loads((paths['other_tokens'] / 'tokenizer.json').read_text())
    vocab = stored['model']['vocab']
    first, second = sorted(vocab, key=vocab.get)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (paths['other_tokens'] / 'tokenizer.json').write_text(json.dumps(stored))
    attention = ['q_proj', 'k_proj', 'v_proj', 'o_proj']
    for name, of, cap in ('capped', 'student', 2.0), ('capped_teacher', 'teacher', 3.0):
        paths[name] = directory / name
        shutil.copytree(paths[of], paths[name])
        config = json.loads((paths[of] / 'config.json').read_text())
        (paths[name] / 'config.json').write_text(json.dumps({**config, 'final_logit_softcapping': cap}))
    paths['adapter'] = make_adapter(paths['student'], directory / 'adapter', [*attention, 'gate_proj', 'up_proj', 'down_proj'])
    paths['moe_adapter'] = make_adapter(paths['moe'], directory / 'moe_adapter', attention)
    paths |= adapted_by_peft(paths['teacher'], directory, [*attention, 'down_proj', 'embed_tokens'])
    paths |= adapted_by_hand(paths['moe_teacher'], directory)
    for name in ('adapted', 'moe_adapted'):
        tokenizer.save_pretrained(paths[name])
    return paths


def make_adapter(student: Path, path: Path, targets: list[str]) -> Path:
    torch.manual_seed(100)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type='CAUSAL_LM')
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(student), config)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if 'lora_B' in name:
            torch.nn.init.normal_(weight, std=0.1)
        # Megatron's fused layers have one A.
        for fused, first in (('k_proj', 'q_proj'), ('v_proj', 'q_proj'), ('up_proj', 'gate_proj')):
            if 'lora_A' in name and fused in name:
                weight.data.copy_(weights[name.replace(fused, first)].data)
    model.save_pretrained(path)
    return path


def adapted_by_peft(teacher: Path, directory: Path, targets: list[str]) -> dict[str, Path]:
    """An adapter with everything that PEFT's scaling knows, and with a head of its own; and the teacher with it."""
    torch.manual_seed(101)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={'o_proj': 2},
        alpha_pattern={'layers.1.self_attn.q_proj': 3},
        target_modules=targets,
        modules_to_save=['lm_head'],
        task_type='CAUSAL_LM',
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(teacher), config)
    for weight in filter(lambda p: p.requires_grad, model.parameters()):
        torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(directory / 'teacher_adapter')
    model.merge_and_unload().save_pretrained(directory / 'adapted')
    return {'teacher_adapter': directory / 'teacher_adapter', 'adapted': directory / 'adapted'}


def adapted_by_hand(teacher: Path, directory: Path) -> dict[str, Path]:
    """An adapter of single experts, of the router and of attention, as Megatron-SWIFT writes them; and the teacher with it."""
    torch.manual_seed(102)
    weights, tensors = load_file(teacher / 'model.safetensors'), {}
    for name in list(weights):
        if name.startswith('model.layers.1.') and weights[name].dim() == 2:
            module = name.removesuffix('.weight')
            a, b = torch.randn(4, weights[name].shape[1]) / 4, torch.randn(weights[name].shape[0], 4) / 4
            tensors |= {f'base_model.model.{module}.lora_A.weight': a, f'base_model.model.{module}.lora_B.weight': b}
            weights[name] = weights[name] + 2 * b @ a
    assert any('.mlp.experts.3.down_proj.' in name for name in tensors)
    paths = {'moe_teacher_adapter': directory / 'moe_teacher_adapter', 'moe_adapted': directory / 'moe_adapted'}
    shutil.copytree(teacher, paths['moe_adapted'])
    save_file(weights, paths['moe_adapted'] / 'model.safetensors', metadata={'format': 'pt'})
    paths['moe_teacher_adapter'].mkdir()
    save_file(tensors, paths['moe_teacher_adapter'] / 'adapter_model.safetensors')
    config = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'bias': 'none', 'target_modules': ['all-linear']}
    (paths['moe_teacher_adapter'] / 'adapter_config.json').write_text(json.dumps(config))
    return paths


# On top of every job. The last step of an epoch of 10 rows has two fillers: micro-batches without a trained token.
QUICK: dict[str, Any] = {
    'rlhf_type': 'gkd',
    'model_type': 'qwen3',
    'template': 'qwen3',
    'ddp_backend': 'gloo',
    'torch_dtype': 'float32',
    'bf16': 'false',
    'fp16': 'false',
    'tuner_type': 'full',
    'micro_batch_size': 1,
    'global_batch_size': 4,
    'train_iters': 1,
    'logging_steps': 1,
    'save_steps': 1000,
    'lr': 1e-3,
    'lr_decay_style': 'constant',
    'max_length': 128,
    'bias_dropout_fusion': 'false',
    'lora_dropout': 0,
    'use_distributed_optimizer': 'false',
    'recompute_granularity': 'none',
    'no_save_optim': 'true',
    'save_safetensors': 'false',
    'report_to': 'recorder',
    'use_vllm': 'false',
    'lmbda': 0,
    'check_model': 'false',
    'load_from_cache_file': 'false',
    'dataset_num_proc': 1,
    'dataloader_num_workers': 0,
    'split_dataset_ratio': 0,
    'add_version': 'false',
}
