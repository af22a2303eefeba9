"""A CPU whose tensors say that they are on a GPU, so that the operator takes the GPU's branches where there is none."""

import torch
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)


class PretendedGPU(TorchFunctionMode):
    """Within it every tensor is on 'cuda:0', and products take the dtypes that CUDA's take (aten/src/ATen/native/cuda/Blas.cpp),
    `out_dtype` included, which torch has for CUDA only. `wide` counts the products with an out_dtype.
    """

    wide = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func == torch.Tensor.device.__get__:
            return torch.device('cuda', 0)
        if 'device' in kwargs and torch.device(kwargs['device']).type == 'cuda':
            kwargs['device'] = 'cpu'
        if func in (torch.mm, torch.addmm):
            return self._product(func, args, **kwargs)
        return func(*args, **kwargs)

    def _product(self, func, tensors, out_dtype=None, out=None, **factors):
        *added, left, right = tensors
        dtype = left.dtype if out_dtype is None else out_dtype
        assert left.dtype == right.dtype, (left.dtype, right.dtype)
        assert dtype == left.dtype or (dtype == torch.float32 and left.dtype in HALF), (left.dtype, dtype)
        assert out is None or out.dtype == dtype, (out.dtype, dtype)
        assert all(x.dtype == dtype or (out_dtype is not None and x.dtype == left.dtype) for x in added), dtype
        self.wide += out_dtype is not None
        found = func(*(x.to(torch.promote_types(dtype, torch.float32)) for x in tensors), **factors).to(dtype)
        return found if out is None else out.copy_(found)
