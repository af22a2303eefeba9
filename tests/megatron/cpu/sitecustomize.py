"""On PYTHONPATH with MEGATRON_ON_CPU=1: the real ``megatron`` command runs without a GPU.

torch is only changed in a process that imports Megatron-SWIFT, right before it does, so that torchrun's own process stays as it is.
"""

import os
import sys


class BeforeMegatron:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == 'swift.megatron':
            sys.meta_path.remove(BeforeMegatron)
            import cpu_device

            cpu_device.install()
        return None


if os.environ.get('MEGATRON_ON_CPU') == '1':
    sys.meta_path.insert(0, BeforeMegatron)
