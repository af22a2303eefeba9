"""The kernels of the elementwise work, the same numbers as the torch path: Triton's in its interpreter, torch.compile's as
they are."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import PretendedGPU

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
        'stride': 'i32',
        'rows': 'i32',
        'best': '*i32',
        'label_column': '*i64',
    }

    def code(kernel, out='*fp32', **constants):
        constants['BLOCK'] = _triton._BLOCK
        given = {**numbers, 'out': out}
        types = {name: 'constexpr' if name in constants else given.get(name, '*fp32') for name in kernel.arg_names}
        # As a launch finds them: memory and strides, but not widths, are multiples of 16.
        aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith('*') or name == 'stride']
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs={(i,): [['tt.divisibility', 16]] for i in aligned})
        made = triton.compile(source, target=GPUTarget('cuda', 90, 32), options={'num_warps': _triton._WARPS}).asm
        narrow = re.findall(r'(ld|st)\.global\.b(?:16|32)', made['ptx'])
        assert narrow.count('ld') <= 10 and narrow.count('st') <= 10, 'numbers of a row are loaded or stored one by one'
        return made['cubin']

    for add in (False, True):
        assert code(_triton._normalise_kernel, ADD=add, LABELS=not add, BEST=True)
    for kind in _triton._KINDS.values():
        for difference in (False, True):
            which = dict(DIFFERENCE=difference, KIND=kind, SMALL=2 * difference)
            assert code(_triton._value_kernel, **which, DETAIL=not difference)
            assert code(_triton._gradient_kernel, **which, LABELS=difference, SOFTCAP=not difference)
        assert code(_triton._gradient_kernel, '*bf16', DIFFERENCE=False, KIND=kind, SMALL=1, LABELS=True, SOFTCAP=True)


def test_triton_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    """Triton starts a kernel on the current device, wherever its tensors are."""
    pytest.importorskip('triton', reason='Triton is not installed')
    from swift_gkd_plugin.divergence import _triton

    current, started = ['another'], []

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor.device.type)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: started.append(current[-1])

    monkeypatch.setattr(torch.cuda, 'device_of', device_of)
    for name in ('_normalise_kernel', '_value_kernel', '_gradient_kernel'):
        monkeypatch.setattr(_triton, name, Kernel())
    z, row = torch.zeros(2, 5), torch.zeros(2)
    _triton.normalise(z, z, False, 1.0, False, False)
    _triton.sums(Divergence(), z, z, False, row, row, row, False)
    _triton.gradient(Divergence(), z, z, False, row, row, row, row, row, None, 1.0, None, z)
    assert started == ['cpu'] * 4 and current == ['another']


def test_without_a_compiler_for_triton(monkeypatch, caplog):
    """The torch path takes over, and one warning says why."""
    pytest.importorskip('triton', reason='Triton is not installed')
    from swift_gkd_plugin.divergence import _triton

    def no_compiler(*args):
        raise RuntimeError('Failed to find C compiler.\nSet CC.')

    monkeypatch.setattr(_triton, 'normalise', no_compiler)
    _triton.works.cache_clear()
    chunks._triton_kernels.cache_clear()
    torch.manual_seed(0)
    hidden, other, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(50, 4)
    expected = linear_divergence(hidden, weight, other, weight.clone(), Divergence())
    with PretendedGPU():
        found = [linear_divergence(hidden, weight, other, weight.clone(), Divergence()) for _ in range(2)]
    assert all(torch.allclose(one, expected, rtol=1e-5) for one in found)
    assert [record.message for record in caplog.records if 'Triton' in record.message] == [
        'Triton does not work here (Failed to find C compiler.): the divergence is computed without it, right but slower'
    ]
    _triton.works.cache_clear()
    chunks._triton_kernels.cache_clear()


@pytest.mark.parametrize('version', ['2.10.0', '2.13.0+cpu'])
def test_any_number_of_options_is_compiled(monkeypatch, version):
    """Also by a torch whose `compile` has no `recompile_limit`, where all closures over one code count as one function."""
    compile_of_torch = torch.compile

    def older(function, *, fullgraph, dynamic, options):
        return compile_of_torch(function, fullgraph=fullgraph, dynamic=dynamic, options=options)

    if version.startswith('2.10'):
        monkeypatch.setattr(torch, 'compile', older)
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion(version))

    def adding(text):
        return _compiled._compile(lambda x: x + len(text))

    for number in range(1, 12):
        assert adding('x' * number)(torch.zeros(2)).tolist() == [number, number]


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
