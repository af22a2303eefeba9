"""The one place here that knows more of the operator than its public functions: which Triton kernels a call starts."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Launch:
    kernel: str
    columns: int  # in all rows, of the largest matrix that it is given
    span: Any


# The environment variable that takes the kernel that reads a row once (1) or the three sweeps (0), where there is a choice.
ONE_LOAD = 'SWIFT_GKD_ONE_LOAD'

# Bytes that a sweep moves for each of a row's columns: what it reads and what it writes, the gradient being bf16.
BYTES_PER_COLUMN = {'normalise': 4, 'value': 8, 'gradient': 10, 'tail_gradient': 6, 'one_load': 10}


def sweep_of(kernel: str) -> str:
    return kernel.strip('_').removesuffix('_kernel')


@contextmanager
def kernel_launches(meter):
    """The list of Triton kernels that are started inside, with events around each; empty where Triton is not there."""
    found: list[Launch] = []
    trials = []  # that go on: what they start is none of the call's
    try:
        import triton
        from triton.runtime.interpreter import InterpretedFunction

        from swift_gkd_plugin.divergence import _trial, _triton
    except ModuleNotFoundError:
        yield found
        return

    def left_out(trial):
        def tried(*args):
            trials.append(trial)
            try:
                return trial(*args)
            finally:
                trials.pop()

        return tried

    def recording(run):
        def recorded(self, *args, grid, warmup, **options):
            if warmup or trials:
                return run(self, *args, grid=grid, warmup=warmup, **options)
            span = meter.span()
            span.start()
            result = run(self, *args, grid=grid, warmup=warmup, **options)
            span.end()
            columns = max((x.numel() for x in args if getattr(x, 'ndim', 0) == 2), default=0)
            found.append(Launch(self.__name__, columns, span))
            return result

        return recorded

    with ExitStack() as stack:
        for module, name in ((_trial, 'wrong'), (_triton, 'off_by')):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, left_out(getattr(module, name)))
        for kind in (triton.JITFunction, InterpretedFunction):
            run = kind.run
            stack.callback(setattr, kind, 'run', run)
            kind.run = recording(run)
        yield found


def one_load_off_by(divergence, vocab: int, device) -> float:
    """How far the kernel that reads a row once is from the three sweeps, of the largest number of each result."""
    import torch

    from swift_gkd_plugin.divergence import _triton
    from swift_gkd_plugin.divergence.sharding import Vocabulary
    from swift_gkd_plugin.divergence.sweeps import Setting

    setting = Setting(divergence, Vocabulary.whole(vocab), divergence.temperature, None, torch.float32, torch.device(device))
    return _triton.off_by(setting, _triton.TRIED, difference=False, labels=True, trained=True, dtype=torch.float32)
