"""The teacher and the student: Qwen3 models small enough to train on two CPU cores, with one token per word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from task import CATEGORY, KEYWORDS, WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = (*KEYWORDS, *WORDS, *CATEGORY)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    special = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<unk>']
    vocab = {token: i for i, token in enumerate([*special, *vocabulary])}
    words = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token='<|im_end|>', pad_token='<|endoftext|>', unk_token='<unk>', chat_template=CHAT_TEMPLATE
    )
    fast.add_special_tokens({'additional_special_tokens': ['<|im_start|>']})
    return fast


def make(directory: Path, *, hidden: int, layers: int, heads: int, seed: int, vocabulary: Sequence[str] = VOCABULARY, **changed) -> None:
    """Write a model with random weights and its tokenizer.

    Args:
        vocabulary: The words, the roles of the messages among them; those of the quickstart's task unless given.
        changed: Other values of its configuration. With ``num_experts`` it is a Qwen3-MoE.
    """
    torch.manual_seed(seed)
    words = tokenizer(vocabulary)
    values = dict(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        initializer_range=0.05,
    )
    model, config = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if 'num_experts' in changed else (Qwen3ForCausalLM, Qwen3Config)
    model(config(**(values | changed))).save_pretrained(directory)
    words.save_pretrained(directory)
