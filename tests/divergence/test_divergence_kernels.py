"""The kernels of the elementwise work, the same numbers as the torch path: Triton's in its interpreter, torch.compile's as
they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swift_gkd_plugin.divergence import Divergence, _compiled, chunks, linear_divergence


def run_worker(name, *arguments):
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1'},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('module', ['_triton', '_compiled'])
def test_kernels_and_torch_path_agree(module):
    if module == '_triton':
        pytest.importorskip('triton', reason='Triton is not installed: the kernels cannot be interpreted')
    run_worker('kernels_worker.py', module)


def test_branches_of_a_gpu():
    """Which products a GPU makes of which dtypes: bf16 and fp16 inputs with fp32 results, gradients kept for one product."""
    pytest.importorskip('triton', reason='Triton is not installed: the kernels cannot be interpreted')
    run_worker('gpu_worker.py')


def test_triton_kernels_compile_for_a_gpu():
    """To the machine code of Hopper, which takes no GPU: the interpreter accepts more than the compiler does."""
    triton = pytest.importorskip('triton', reason='Triton is not installed')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swift_gkd_plugin.divergence import _triton

    numbers = {
        'temperature': 'fp32',
        'w': 'fp32',
        'rest': 'fp32',
        'softcap': 'fp32',
        'columns': 'i32',
        'rows': 'i32',
        'best': '*i32',
        'label_column': '*i64',
    }

    def code(kernel, out='*fp32', **constants):
        constants['BLOCK'] = _triton._BLOCK
        given = {**numbers, 'out': out}
        types = {name: 'constexpr' if name in constants else given.get(name, '*fp32') for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        return triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': _triton._WARPS}).asm['cubin']

    for add in (False, True):
        assert code(_triton._normalise_kernel, ADD=add, LABELS=not add, BEST=True)
    for kind in _triton._KINDS.values():
        for difference in (False, True):
            which = dict(DIFFERENCE=difference, KIND=kind, SMALL=2 * difference)
            assert code(_triton._value_kernel, **which, DETAIL=not difference)
            assert code(_triton._gradient_kernel, **which, LABELS=difference, SOFTCAP=not difference)
        assert code(_triton._gradient_kernel, '*bf16', DIFFERENCE=False, KIND=kind, SMALL=1, LABELS=True, SOFTCAP=True)


def test_large_vocabularies_are_compiled_on_a_cpu(monkeypatch, caplog):
    """From _COMPILED_VOCABULARY on. Where compiling fails the torch path gives the same loss, and one warning says so."""
    torch.manual_seed(0)
    hidden, other, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(chunks._COMPILED_VOCABULARY, 4)
    made = []
    monkeypatch.setattr(_compiled, 'normalise', lambda *args, original=_compiled.normalise: made.append(1) or original(*args))
    small = slice(0, chunks._COMPILED_VOCABULARY - 1)
    linear_divergence(hidden, weight[small], other, weight[small], Divergence())
    assert not made
    compiled = linear_divergence(hidden, weight, other, weight, Divergence())
    assert made

    def no_compiler(function):
        raise RuntimeError('no C++ compiler')

    monkeypatch.setattr(_compiled, '_compile', no_compiler)
    _compiled.works.cache_clear()
    made.clear()
    for _ in range(2):
        assert torch.allclose(linear_divergence(hidden, weight, other, weight, Divergence()), compiled, rtol=1e-5)
    assert not made
    assert sum('no C++ compiler' in record.message for record in caplog.records) == 1
    _compiled.works.cache_clear()
