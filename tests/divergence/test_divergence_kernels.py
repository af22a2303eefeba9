"""The kernels of the elementwise work, the same numbers as the torch path: Triton's in its interpreter, torch.compile's as
they are."""

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import PretendedGPU
from workers import run_worker

from swift_gkd_plugin.divergence import Divergence, _compiled, implementations, linear_divergence, operator
from swift_gkd_plugin.divergence._eager import Eager
from swift_gkd_plugin.divergence.sharding import Vocabulary
from swift_gkd_plugin.divergence.sweeps import Logits, Setting, Tokens

PARTS = ['dense', 'few', 'strided', 'certain', 'half']
# At their extremes the compiled loops are torch operations: they call the same functions.
CASES = [('Triton', part) for part in ('extremes', 'close_few tempered', 'nan', 'one_load')]
CASES += itertools.product(['Triton', 'Compiled'], PARTS)


@pytest.mark.parametrize(('sweeps', 'part'), CASES)
def test_kernels_and_torch_operations_agree(tmp_path, sweeps, part):
    if sweeps == 'Triton':
        pytest.importorskip('triton', reason='Triton is not installed: the kernels cannot be interpreted')
    run_worker('kernels_worker.py', sweeps, *part.split(), cwd=tmp_path)


def test_branches_of_a_gpu(tmp_path):
    """Which products a GPU makes of which dtypes: bf16 and fp16 inputs with fp32 results, gradients kept for one product."""
    pytest.importorskip('triton', reason='Triton is not installed: the kernels cannot be interpreted')
    run_worker('gpu_worker.py', cwd=tmp_path)


def test_counts_of_the_machine_code():
    """The kernels compile for Hopper, which takes no GPU (the interpreter accepts more than the compiler does), and cost no more
    than benchmarks/divergence/kernels.csv says, which is what was aimed at."""
    pytest.importorskip('triton', reason='Triton is not installed')
    script = Path(__file__).resolve().parents[2] / 'benchmarks' / 'divergence' / 'kernels.py'
    done = subprocess.run([sys.executable, str(script), '--check'], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


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
    for name in vars(_triton.kernels):
        if name.endswith('_kernel'):
            monkeypatch.setattr(_triton.kernels, name, Kernel())
    z, ids, double = torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2, dtype=torch.float64)
    sweeps = _triton.Triton(Setting(Divergence(), Vocabulary.whole(5), 1.0, None, torch.float32, z.device))
    logits, tokens = Logits(z, z), Tokens(ids[:, 0], double[0], None, double, double, sums=z[:, :2])
    sweeps.take(z, ids, torch.zeros(2, 3))
    sweeps.normalise(logits, tokens)
    sweeps.sums(Divergence(), logits, tokens, tokens.sums)
    sweeps.gradient(logits, tokens, z)
    sweeps.tail_gradient(logits, tokens, None, z)
    sweeps.put(ids, torch.zeros(2, 3), z)
    sweeps.combine(double[None], double)
    sweeps.one_load(logits, tokens, z)
    assert started == ['cpu'] * 9 and current == ['another']


def test_a_divergence_without_a_kernel(monkeypatch):
    """Torch operations do its work on a GPU."""
    pytest.importorskip('triton', reason='Triton is not installed')
    from swift_gkd_plugin.divergence import _triton

    monkeypatch.setattr(_triton, 'works', lambda *args: True)
    monkeypatch.setattr(_triton.Triton, 'kinds', {'jsd'})
    implementations._on_gpu.cache_clear()
    chosen = []
    monkeypatch.setattr(operator, '_apply', lambda call, reduction: chosen.append(implementations.choose(call)))
    hidden, weight = torch.randn(3, 4), torch.randn(50, 4)
    for divergence in (Divergence(), Divergence('tvd'), Divergence(beta=0)):
        with PretendedGPU():
            linear_divergence(hidden, weight, hidden, weight.clone(), divergence)
    assert chosen == [_triton.Triton, Eager, Eager]
    implementations._on_gpu.cache_clear()


def test_without_a_compiler_for_triton(monkeypatch, caplog):
    """The torch path takes over, and one warning says why."""
    pytest.importorskip('triton', reason='Triton is not installed')
    from swift_gkd_plugin.divergence import _triton

    def no_compiler(*args):
        raise RuntimeError('Failed to find C compiler.\nSet CC.')

    monkeypatch.setattr(_triton.Triton, 'take', no_compiler)  # the first that is started
    _triton.works.cache_clear()
    implementations._on_gpu.cache_clear()
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
    implementations._on_gpu.cache_clear()


def off_by_a_little(name, method):
    """Torch operations, of which one adds 3e-3 of itself to what it leaves."""

    def wrong(self, *args, **kwargs):
        found = getattr(Eager, method)(self, *args, **kwargs)
        for tensor in WRITTEN[method](found, *args):
            tensor.mul_(1.003)
        return found

    return type(name, (Eager,), {method: wrong})


WRITTEN = {
    'normalise': lambda found, logits, tokens: [tokens.lse, *([] if tokens.label_lse is None else [tokens.label_lse])],
    'sums': lambda found, divergence, logits, tokens, out: [out[:1]],
    'gradient': lambda found, logits, tokens, out: [out],
    'tail_gradient': lambda found, logits, tokens, weight, out: [out],
    'combine': lambda found, gathered, norms: [norms],
    'take': lambda found, logits, ids, out, *rest: [out],
    'compare': lambda found, listed, tokens: [found[1]],
    'put': lambda found, ids, values, out: [out],
}


@pytest.mark.parametrize(
    ('method', 'what'),
    [
        ('normalise', 'cross_entropy of jsd, two heads'),
        ('sums', 'divergence of jsd, two heads'),
        ('gradient', 'gradient of jsd, two heads'),
        ('tail_gradient', 'gradient of jsd, top-k'),
        ('combine', 'log-sum-exp over ranks'),
        ('take', 'cross_entropy of jsd, two heads'),
        ('compare', 'gradient of jsd, top-k'),
        ('put', 'gradient of jsd, top-k'),
    ],
)
def test_wrong_numbers_on_a_device(monkeypatch, caplog, method, what):
    """The first use of kernels tries all of them. Torch operations take over from any that is wrong, and a warning says which."""
    pytest.importorskip('triton', reason='Triton is not installed')
    from swift_gkd_plugin.divergence import _trial, _triton

    monkeypatch.setitem(_trial._BOUND, torch.bfloat16, 1e-4)  # torch operations write no bf16
    monkeypatch.setattr(_triton, 'Triton', off_by_a_little('Wrong', method))
    for cache in (_triton.works, implementations._on_gpu):
        cache.cache_clear()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    hidden, weight = torch.ones(3, 4), torch.eye(50, 4)
    with PretendedGPU():
        found = [linear_divergence(hidden, weight, hidden * 2, weight.clone(), Divergence()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(found[1], linear_divergence(hidden, weight, hidden * 2, weight.clone(), Divergence()), rtol=1e-5)
    (message,) = (record.message for record in caplog.records if 'Triton' in record.message)
    assert f'(a kernel gives wrong numbers: {what})' in message
    for cache in (_triton.works, implementations._on_gpu):
        cache.cache_clear()


def test_right_numbers_on_a_device():
    """Torch operations are never found wrong, whatever the divergence."""
    _trial = pytest.importorskip('swift_gkd_plugin.divergence._trial')
    for divergence in (Divergence(), Divergence(beta=1e-6), Divergence('tvd', temperature=1e-3), Divergence('forward_kl')):
        assert _trial.wrong(Eager, divergence, torch.device('cpu')) is None


@pytest.mark.parametrize('version', ['2.10.0', '2.13.0+cpu'])
def test_any_number_of_options_is_compiled(monkeypatch, version):
    """Also by a torch whose `compile` has no `recompile_limit`, where all closures over one code count as one function."""
    compile_of_torch = torch.compile

    def newer(function, *, options, **how):
        return compile_of_torch(function, backend='eager', **how)  # it is torch.compile itself that counts, in front of any back end

    def older(function, *, fullgraph, dynamic, options):
        return newer(function, fullgraph=fullgraph, dynamic=dynamic, options=options)

    if not version.startswith('2.10') and torch.__version__ < (2, 13):
        pytest.skip(f'torch {torch.__version__} has no isolate_recompiles')
    monkeypatch.setattr(torch, 'compile', older if version.startswith('2.10') else newer)
    monkeypatch.setattr(torch, '__version__', torch.torch_version.TorchVersion(version))

    def adding(text):
        return _compiled._compile(lambda x: x + len(text))

    for number in range(1, 12):
        assert adding('x' * number)(torch.zeros(2)).tolist() == [number, number]


def test_long_runs_of_large_vocabularies_are_compiled_on_a_cpu(monkeypatch, caplog):
    """Once there were so many logits that compiling would have cost less. One line says so, and where compiling fails torch
    operations give the same loss, and one warning says that."""
    torch.manual_seed(0)
    vocabulary = implementations._COMPILED_VOCABULARY
    hidden, other, weight = torch.randn(3, 4), torch.randn(3, 4), torch.randn(vocabulary, 4)
    made = []
    original = _compiled.Compiled.normalise
    monkeypatch.setattr(_compiled.Compiled, 'normalise', lambda *args: made.append(1) or original(*args))
    monkeypatch.setattr(implementations, '_worked_on', 0)
    monkeypatch.setattr(implementations, 'COMPILED_AFTER', 2 * 3 * vocabulary)
    small = slice(0, vocabulary - 1)
    for _ in range(3):
        linear_divergence(hidden, weight[small], other, weight[small], Divergence())
    eager, _ = (linear_divergence(hidden, weight, other, weight, Divergence()) for _ in range(2))
    assert not made
    for _ in range(2):
        assert torch.allclose(linear_divergence(hidden, weight, other, weight, Divergence()), eager, rtol=1e-5)
    assert len(made) == 2 and sum('torch.compile now makes' in record.message for record in caplog.records) == 1

    def no_compiler(function):
        raise RuntimeError('no C++ compiler')

    monkeypatch.setattr(_compiled, '_compile', no_compiler)
    for cache in (_compiled.works, implementations._compiled_sweeps):
        cache.cache_clear()
    for _ in range(2):
        assert torch.allclose(linear_divergence(hidden, weight, other, weight, Divergence()), eager, rtol=1e-5)
    assert len(made) == 2
    assert sum('no C++ compiler' in record.message for record in caplog.records) == 1
    for cache in (_compiled.works, implementations._compiled_sweeps):
        cache.cache_clear()
