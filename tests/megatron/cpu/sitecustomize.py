"""On PYTHONPATH with MEGATRON_ON_CPU=1: the real ``megatron`` command runs without a GPU.

torch is only changed in a process that imports Megatron-SWIFT, right before it does, so that torchrun's own process stays as it is.
"""

import importlib.util
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
if 'ALSO_AT_START' in os.environ:  # Python runs one sitecustomize.py only
    spec = importlib.util.spec_from_file_location('also_at_start', os.environ['ALSO_AT_START'])
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
