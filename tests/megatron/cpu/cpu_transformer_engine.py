"""The part of NVIDIA's ``transformer_engine`` that megatron-core 0.16 and its bridge build models from, in plain torch.

Parameters, their names and the attributes that megatron-core reads are those of Transformer Engine 2. Tensor-parallel communication is
megatron-core's own; context parallelism gathers keys and values, in the same zigzag layout. No FP8, no fused kernels.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import itertools
import sys
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

VERSION = '2.6.0'  # from 2.7 on megatron-core imports kernels that only a GPU has


def size_of(group) -> int:
    return dist.get_world_size(group) if group is not None and dist.is_initialized() else 1


class Base(nn.Module):
    """What megatron-core asks of any module of Transformer Engine."""

    tp_group, tp_size, sequence_parallel = None, 1, False

    def set_tensor_parallel_group(self, group) -> None:
        self.tp_group = group

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)  # of FP8, in a real one

    def set_extra_state(self, state) -> None:
        pass

    def backward_dw(self) -> None:
        pass

    def new_parameter(self, shape, dtype, device, init_method, tracker, tracker_name, split_dim) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype or torch.get_default_dtype(), device=device))
        forked = contextlib.nullcontext()
        if tracker is not None:
            forked = tracker().fork(tracker_name) if tracker_name else tracker().fork()
        with torch.no_grad(), forked:
            (init_method or nn.init.zeros_)(parameter)
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, split_dim, 1
        return parameter


def normalised(x, weight, bias, eps, kind, zero_centered):
    wide, weight = x.float(), weight.float() + zero_centered
    if kind == 'RMSNorm':
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return F.layer_norm(wide, wide.shape[-1:], weight, None if bias is None else bias.float(), eps).to(x.dtype)


class Linear(Base):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device='cpu',
        ub_name=None,
        **_,
    ):
        super().__init__()
        self.fuse_wgrad_accumulation, self.ub_name = fuse_wgrad_accumulation, ub_name
        self.get_rng_state_tracker, self.rng_tracker_name = get_rng_state_tracker, rng_tracker_name
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else size_of(tp_group)
        self.parallel_mode, self.sequence_parallel = parallel_mode, sequence_parallel and self.tp_size > 1
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == 'row' else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == 'column' else 1)
        self.weight_names, self.bias_names = ['weight'], ['bias']
        split_dim = 1 if parallel_mode == 'row' else 0
        self.weight = self.new_parameter(
            (self.out_features, self.in_features), params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name, split_dim
        )
        if bias:
            self.bias = self.new_parameter((self.out_features,), params_dtype, device, None, None, None, 0)
            if parallel_mode == 'row':
                self.bias.tensor_model_parallel, self.bias.sequence_parallel = False, self.sequence_parallel
        else:
            self.bias = torch.empty(0, dtype=self.weight.dtype)

    def product(self, x):
        from megatron.core.tensor_parallel import mappings

        split, group = self.tp_size > 1, self.tp_group
        if split and self.parallel_mode == 'column':
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        y = F.linear(x, self.weight)
        if split and self.parallel_mode == 'row':
            if self.sequence_parallel:
                y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
            else:
                y = mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        if self.apply_bias:
            y = y + self.bias
        return (y, self.bias) if self.return_bias else y

    def forward(self, x, is_first_microbatch=None, **_):
        return self.product(x)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        normalization='LayerNorm',
        return_layernorm_output=False,
        zero_centered_gamma=False,
        params_dtype=None,
        device='cpu',
        **kwargs,
    ):
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **kwargs)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.return_layernorm_output = return_layernorm_output
        norm = Norm(normalization, in_features, eps, self.sequence_parallel, zero_centered_gamma, params_dtype, device)
        self.layer_norm_weight, self.layer_norm_bias = norm.weight, norm.bias

    def forward(self, x, is_first_microbatch=None, **_):
        x = normalised(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization, self.zero_centered_gamma)
        y = self.product(x)
        if not self.return_layernorm_output:
            return y
        return (*y, x) if self.return_bias else (y, x)


class Norm(Base):
    def __init__(self, kind, hidden_size, eps, sequence_parallel, zero_centered_gamma, dtype, device):
        super().__init__()
        self.kind, self.eps, self.zero_centered_gamma, self.sequence_parallel = kind, eps, zero_centered_gamma, sequence_parallel
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - zero_centered_gamma, dtype=dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel
        self.bias = None
        if kind == 'LayerNorm':
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, x):
        return normalised(x, self.weight, self.bias, self.eps, self.kind, self.zero_centered_gamma)


class RMSNorm(Norm):
    def __init__(self, hidden_size, eps=1e-5, sequence_parallel=False, zero_centered_gamma=False, params_dtype=None, device='cpu', **_):
        super().__init__(type(self).__name__, hidden_size, eps, sequence_parallel, zero_centered_gamma, params_dtype, device)


class LayerNorm(RMSNorm):
    pass


class GroupedLinear(Base):
    """The experts of one rank, one matrix each."""

    fp8_meta = {'fp8_checkpoint': False}
    fp8 = fp8_calibration = False

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass

    def __init__(
        self,
        num_gemms,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        rng_tracker_name=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        device='cpu',
        ub_name=None,
        **_,
    ):
        super().__init__()
        self.num_gemms, self.ub_name, self.fuse_wgrad_accumulation = num_gemms, ub_name, fuse_wgrad_accumulation
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else size_of(tp_group)
        self.parallel_mode, self.sequence_parallel = parallel_mode, sequence_parallel and self.tp_size > 1
        self.use_bias, self.return_bias, self.apply_bias = bias, return_bias, bias and not return_bias
        self.in_features = in_features // (self.tp_size if parallel_mode == 'row' else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == 'column' else 1)
        shape, split_dim = (self.out_features, self.in_features), 1 if parallel_mode == 'row' else 0
        for i in range(num_gemms):
            weight = self.new_parameter(shape, params_dtype, device, init_method, get_rng_state_tracker, rng_tracker_name, split_dim)
            self.register_parameter(f'weight{i}', weight)
            if bias:
                self.register_parameter(f'bias{i}', self.new_parameter(shape[:1], params_dtype, device, None, None, None, 0))
            else:
                setattr(self, f'bias{i}', torch.empty(0, dtype=weight.dtype))

    def forward(self, x, m_splits, is_first_microbatch=None, **_):
        parts = x.split([int(rows) for rows in m_splits])
        biases = [getattr(self, f'bias{i}') for i in range(self.num_gemms)]
        products = [F.linear(part, getattr(self, f'weight{i}'), biases[i] if self.apply_bias else None) for i, part in enumerate(parts)]
        return (torch.cat(products), biases) if self.return_bias else torch.cat(products)


class GatherSequence(torch.autograd.Function):
    """The shards of all context-parallel ranks, one after the other; each gets the sum of the gradients of its shard."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.length = group, len(x)
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shards, x.contiguous(), group=group)
        return torch.cat(shards)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.split(ctx.length)[dist.get_rank(ctx.group)], None


def zigzag(length: int, rank: int, size: int, boundaries: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, place in it) of each token that a context-parallel rank holds.

    A sequence is cut into 2·size pieces; a rank holds one from its beginning and the mirrored one from its end.
    """
    sequences, places = [], []
    for number, (first, last) in enumerate(itertools.pairwise(boundaries)):
        place = torch.arange(last - first)
        if size > 1:
            pieces = place.chunk(2 * size)
            place = torch.cat([pieces[rank], pieces[2 * size - 1 - rank]]) if len(place) else place
        places.append(place)
        sequences.append(torch.full_like(place, number))
    return torch.cat(sequences)[:length], torch.cat(places)[:length]


# Names of masks: whether a query sees what comes after it, and where the last of queries and keys of different number are the same token
# ("bottom right"; else it is the first of both).
MASKS = {
    'no_mask': (False, False),
    'padding': (False, False),
    'causal': (True, False),
    'padding_causal': (True, False),
    'causal_bottom_right': (True, True),
    'padding_causal_bottom_right': (True, True),
    'arbitrary': (False, False),
}


class DotProductAttention(nn.Module):
    """Transformer Engine's, with the masks of its documentation.

    Raises:
        ValueError: A mask, a window or a bias that this one does not know, or a mask that is asked for and not given.
    """

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format='sbhd',
        attn_mask_type='causal',
        window_size=None,
        softmax_scale=None,
        tp_group=None,
        cp_group=None,
        **_,
    ):
        super().__init__()
        if window_size not in (None, (-1, -1), (-1, 0)):
            raise ValueError(f'window_size {window_size}: there are no sliding windows on a CPU')
        self.attention_dropout, self.qkv_format, self.attn_mask_type = attention_dropout, qkv_format, attn_mask_type
        self.window_size, self.softmax_scale, self.tp_group, self.cp_group = window_size, softmax_scale, tp_group, cp_group

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type='p2p'):
        self.cp_group = cp_group

    def set_tensor_parallel_group(self, group):
        self.tp_group = group

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_q_padded=None,
        attn_mask_type=None,
        window_size=None,
        core_attention_bias=None,
        **_,
    ):
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in MASKS:
            raise ValueError(f'attn_mask_type {mask_type}: must be one of {", ".join(MASKS)}')
        if window_size not in (None, (-1, -1), (-1, 0)) or core_attention_bias is not None:
            raise ValueError(f'window_size {window_size} or core_attention_bias: there is neither on a CPU')
        causal, bottom_right = MASKS[mask_type]
        packed = (qkv_format or self.qkv_format) == 'thd'
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        size = size_of(self.cp_group)
        rank = dist.get_rank(self.cp_group) if size > 1 else 0
        boundaries = [0, len(query) * size]
        if packed:
            boundaries = (cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded).tolist()
        if len(query) == len(key):
            q_sequence, q_place = zigzag(len(query), rank, size, boundaries)
            k_sequence, k_place = (torch.cat(x) for x in zip(*(zigzag(len(key), r, size, boundaries) for r in range(size)), strict=True))
        elif packed or size > 1:
            raise ValueError(f'{len(query)} queries and {len(key)} keys: packed rows and context-parallel ranks have as many of both')
        else:
            q_place, k_place = torch.arange(len(query)) + bottom_right * (len(key) - len(query)), torch.arange(len(key))
            q_sequence, k_sequence = torch.zeros_like(q_place), torch.zeros_like(k_place)
        if size > 1:
            key, value = GatherSequence.apply(key, self.cp_group), GatherSequence.apply(value, self.cp_group)
        seen = q_sequence[:, None] == k_sequence
        if causal:
            seen = seen & (k_place <= q_place[:, None])
        seen = seen[None, None]
        if not packed and ('padding' in mask_type or mask_type == 'arbitrary'):
            if attention_mask is None:
                raise ValueError(f'attn_mask_type {mask_type}: needs an attention_mask')
            seen = seen & ~attention_mask
        shared = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(shared, 2) for x in (key, value))
        scale = query.shape[-1] ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.einsum('qbhd,kbhd->bhqk', query.float(), key.float()) * scale
        weights = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
        weights = F.dropout(weights, self.attention_dropout, self.training)
        mixed = torch.einsum('bhqk,kbhd->qbhd', weights, value.float()).to(query.dtype).flatten(2)
        return mixed.squeeze(1) if packed else mixed


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose step count lies in the parameter group, where the distributed optimizer looks for it."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group['step'] = step = group.get('step', 0) + 1
            decay1, decay2 = group['betas']
            for p in group['params']:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name in ('exp_avg', 'exp_avg_sq'):
                    if name not in state:
                        state[name] = torch.zeros_like(p.data)
                gradient = p.grad.to(p.dtype)
                mean = state['exp_avg'].mul_(decay1).add_(gradient, alpha=1 - decay1)
                square = state['exp_avg_sq'].mul_(decay2).addcmul_(gradient, gradient, value=1 - decay2)
                root = (square / (1 - decay2**step)).sqrt_().add_(group['eps'])
                p.mul_(1 - group['lr'] * group['weight_decay']).addcdiv_(mean, root, value=-group['lr'] / (1 - decay1**step))


class RNGTracker:
    """Named states of the generator of random numbers."""

    def __init__(self):
        self.states_ = {}

    def reset(self):
        self.states_ = {}

    def get_states(self):
        return dict(self.states_)

    def set_states(self, states):
        self.states_ = states

    def add(self, name, seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self, name='model-parallel-rng'):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()


class SplitAlongDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, sizes, squeeze=False):
        ctx.dim = dim
        return tuple(part.contiguous() for part in x.split(sizes, dim))

    @staticmethod
    def backward(ctx, *gradients):
        return torch.cat(gradients, ctx.dim), None, None, None


def checkpoint(
    function, *args, distribute_saved_activations=False, get_rng_state_tracker=None, tp_group=None, use_reentrant=None, **kwargs
):
    from megatron.core.tensor_parallel.random import checkpoint

    return checkpoint(lambda *inputs: function(*inputs, **kwargs), distribute_saved_activations, *args)


@contextlib.contextmanager
def full_precision(*args, enabled=False, **kwargs):
    assert not enabled, 'there is no FP8 on a CPU'
    yield


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False

    @staticmethod
    def with_fp8_parameters():
        return False


class Recipe:
    def __init__(self, *args, **kwargs):
        pass


def named(name: str, base: type = object) -> type:
    return type(name, (base,), {})


def install() -> None:
    """Register the package. What is not listed can't be imported, and megatron-core then does without it."""
    pytorch = 'transformer_engine.pytorch'
    contents = {
        'transformer_engine': {'__version__': VERSION},
        'transformer_engine.common': {},
        'transformer_engine.common.recipe': {
            **{
                name: named(name, Recipe)
                for name in (
                    'Recipe',
                    'DelayedScaling',
                    'Float8CurrentScaling',
                    'Float8BlockScaling',
                    'MXFP8BlockScaling',
                    'NVFP4BlockScaling',
                )
            },
            'Format': named('Format'),
        },
        pytorch: {
            **{c.__name__: c for c in (Linear, LayerNormLinear, LayerNorm, RMSNorm, GroupedLinear, DotProductAttention)},
            'fp8_autocast': full_precision,
            'fp8_model_init': full_precision,
        },
        f'{pytorch}.ops': {'Sequential': nn.Sequential, 'FusibleOperation': nn.Module},
        f'{pytorch}.fp8': {
            'FP8GlobalStateManager': FP8GlobalStateManager,
            'fp8_autocast': full_precision,
            'fp8_model_init': full_precision,
        },
        f'{pytorch}.distributed': {
            'CudaRNGStatesTracker': RNGTracker,
            'checkpoint': checkpoint,
            'activation_recompute_forward': full_precision,
            'is_fp8_activation_recompute_enabled': lambda: False,
        },
        f'{pytorch}.attention': {'_SplitAlongDim': SplitAlongDim, 'DotProductAttention': DotProductAttention},
        f'{pytorch}.attention.dot_product_attention': {},
        f'{pytorch}.attention.dot_product_attention.utils': {
            'FlashAttentionUtils': type('FlashAttentionUtils', (), dict(is_installed=False, v3_is_installed=False, v4_is_installed=False))
        },
        f'{pytorch}.utils': {'SplitAlongDim': SplitAlongDim},
        f'{pytorch}.tensor': {'QuantizedTensor': named('QuantizedTensor', torch.Tensor)},
        f'{pytorch}.optimizers': {'FusedAdam': FusedAdam, 'FusedSGD': torch.optim.SGD},
        f'{pytorch}.module': {},
        f'{pytorch}.module.base': {'TransformerEngineBaseModule': Base},
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__file__, module.__path__ = __file__, []
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition('.')
        if parent:
            setattr(sys.modules[parent], child, module)
