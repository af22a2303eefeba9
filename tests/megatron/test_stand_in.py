"""The attention that stands in for Transformer Engine's has the mask that is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(scope='module')
def attention_of():
    spec = importlib.util.spec_from_file_location('stand_in', Path(__file__).parent / 'cpu' / 'cpu_transformer_engine.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DotProductAttention


ALL = torch.ones(3, 5, dtype=torch.bool)
PADDED = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
PADDED[..., 4] = True  # Transformer Engine's masks say what is not seen
ANY = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)[None, None]


@pytest.mark.parametrize(
    ('mask_type', 'mask', 'seen'),
    [
        ('no_mask', None, ALL),
        ('causal', None, ALL.tril()),
        ('causal_bottom_right', None, ALL.tril(2)),
        ('padding', PADDED, ~PADDED[0, 0]),
        ('padding_causal', PADDED, ALL.tril() & ~PADDED[0, 0]),
        ('padding_causal_bottom_right', PADDED, ALL.tril(2) & ~PADDED[0, 0]),
        ('arbitrary', ANY, ~ANY[0, 0]),
    ],
)
def test_three_queries_and_five_keys(attention_of, mask_type, mask, seen):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 4), torch.randn(5, 1, 2, 4), torch.randn(5, 1, 2, 4)
    found = attention_of(2, 4)(query, key, value, mask, attn_mask_type=mask_type)
    by_head = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    expected = scaled_dot_product_attention(*by_head, attn_mask=seen).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('mask_type', 'message', 'given'),
    [
        ('sliding', 'attn_mask_type sliding: must be one of', {}),
        ('padding', 'padding: needs an attention_mask', {}),
        ('arbitrary', 'arbitrary: needs an attention_mask', {}),
        ('causal', 'window_size', {'window_size': (4, 0)}),
        ('causal', 'core_attention_bias', {'core_attention_bias': torch.zeros(1)}),
        ('causal', '3 queries and 5 keys', {'qkv_format': 'thd'}),
    ],
)
def test_what_it_does_not_know(attention_of, mask_type, message, given):
    query, key = torch.randn(3, 1, 2, 4), torch.randn(5, 1, 2, 4)
    if given.get('qkv_format') == 'thd':
        query, key = query[:, 0], key[:, 0]
        given = {**given, 'cu_seqlens_q': torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=message):
        attention_of(2, 4)(query, key, key, attn_mask_type=mask_type, **given)
    with pytest.raises(ValueError, match='window_size'):
        attention_of(2, 4, window_size=(4, 0))
