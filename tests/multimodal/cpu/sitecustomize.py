"""Lets torchvision be imported beside a torch for CPUs. Python runs this when it starts, where the directory is in PYTHONPATH.

torchvision on PyPI is built for CUDA, and its import fails where it describes operators that its own library has not registered:
``operator torchvision::nms does not exist``. Nothing calls them, so declaring them is enough. It has to happen right before the import;
importing torch here would cost every process a second.
"""

import importlib.util
import sys


class DeclaresOperators:
    """A finder that steps in once, for torchvision, and leaves the finding to the others."""

    library = None  # the operators live as long as it does

    def find_spec(self, name, path, target=None):
        if name != 'torchvision':
            return None
        sys.meta_path.remove(self)
        import torch

        library = DeclaresOperators.library = torch.library.Library('torchvision', 'DEF')
        for operator in ('nms', 'qnms'):
            library.define(f'{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        return importlib.util.find_spec(name)


sys.meta_path.insert(0, DeclaresOperators())
