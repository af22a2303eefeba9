"""How much a rank generates at a time: the keys and values of the rows on their way fit a budget, and so does each forward pass."""

from __future__ import annotations

from torch import nn

# Keys and values of the rows on their way, where --gkd_generation_tokens does not say how many tokens they are.
CACHE_BYTES = 8 * 2**30
# What a model keeps for a token if its configuration does not say: 65,536 of them fit.
BYTES_PER_TOKEN = 2**17
# Tokens of one forward pass. Prompts go through the model at once, and inside a layer a token of a 70B model takes about 250 KB.
PASS_TOKENS = 2**15


def default_tokens(bytes_per_token: int | None) -> int:
    """The budget in tokens of a model that keeps so much for each; None or 0 if that is not known."""
    return CACHE_BYTES // (bytes_per_token or BYTES_PER_TOKEN)


def bytes_per_token(model: nn.Module) -> int | None:
    """What a model of transformers keeps for a token, by its configuration; None if that does not say. A layer that keeps less than
    attention over the whole sequence does is counted as if it did not."""
    config = model.config.get_text_config(decoder=True)
    names = ('num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'hidden_size', 'head_dim', 'qk_head_dim', 'v_head_dim')
    # Missing: state space models have no heads, older configurations only one kind of them.
    layers, heads, kv_heads, hidden, head, key, value = (getattr(config, name, None) for name in names)
    kv_heads = kv_heads or heads
    if not isinstance(layers, int) or not isinstance(kv_heads, int):  # some models have a list, an entry for each layer
        return None
    head = head or hidden // heads
    return layers * kv_heads * ((key or head) + (value or head)) * model.dtype.itemsize


def waves(lengths: list[int], max_tokens: int, budget: int) -> list[list[int]]:
    """Share prompts out to batches that are answered one after another, the longest first: what is too much shows at once.

    Args:
        lengths: Tokens of each prompt; in a batch all rows are as long as the longest.
        max_tokens: Of a response.
        budget: Tokens, prompts and responses, of a batch.

    Returns:
        Numbers of prompts. A prompt that is too long for the budget is alone.
    """
    waiting = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    found = []
    while waiting:
        longest = lengths[waiting[0]]
        rows = max(1, min(budget // (longest + max_tokens), PASS_TOKENS // longest))
        found.append(waiting[:rows])
        del waiting[:rows]
    return found
