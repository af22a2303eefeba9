"""Large buffers.

The first touch of fresh memory is work of the operating system's, a page at a time. On a CPU a chunk's logits and the
head's gradient are hundreds of megabytes of it: in pages of 4 KiB it takes as long as all the elementwise work.
"""

import math
import mmap

import torch
from torch import Tensor

_LARGE = 32 << 20  # bytes from which huge pages (2 MiB with most kernels) waste nothing to speak of


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on a CPU in huge pages where Linux has them to give."""
    size = math.prod(shape) * dtype.itemsize
    if device.type == 'cpu' and size >= _LARGE and hasattr(mmap, 'MADV_HUGEPAGE'):
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype).view(shape)  # which unmaps it when the tensor goes
        except OSError:  # a kernel without them, or no memory: torch's error names the size
            pass
    return torch.empty(shape, dtype=dtype, device=device)


class Rows:
    """Uninitialised memory of `rows` rows of `columns` numbers; a slice of it is a tensor [rows, columns].

    On a GPU every row starts at a multiple of 64 numbers, so that of any width (151,665 columns, say) kernels load four at
    a time and matrix products find their operands aligned.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        self.rows, self.columns = rows, columns
        self.stride = columns if device.type == 'cpu' else -(-columns // 64) * 64
        self.flat = empty(rows * self.stride, dtype=dtype, device=device)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice) -> Tensor:
        # Of flat memory: a compiled sweep is made for one relation of a view to its base.
        found = self.flat[rows.start * self.stride : rows.stop * self.stride].view(-1, self.stride)
        return found if self.stride == self.columns else found[:, : self.columns]
