"""The host's copy of a teacher: as large as its weights, once per machine, and never there twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from swift.utils import get_logger
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swift_gkd_plugin.arguments import OptionError
from swift_gkd_plugin.teachers import host_memory
from swift_gkd_plugin.teachers.host_memory import HostMemory, available_bytes
from swift_gkd_plugin.teachers.offload import HostCopy, LayerStream

CPU = torch.device('cpu')
WAYS = {
    'model': lambda model, replica=None: HostCopy(model.parameters(), CPU, replica),
    'layer': lambda model, replica=None: LayerStream(model, CPU, replica),
}


class Layer(nn.Module):
    def __init__(self, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(64, inner), nn.Linear(inner, 64, dtype=torch.bfloat16)

    def forward(self, x):
        return x + self.down(self.up(x).relu().to(torch.bfloat16)).float()


class Teacher(nn.Module):
    _no_split_modules = ('Layer',)

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Layer(65 + 30 * n) for n in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def rounded(nbytes: int, to: int = 256) -> int:
    return -(-nbytes // to) * to


class Filling(TorchDispatchMode):
    """Watches a block being filled.

    Attributes:
        most: Bytes of weights that are in the block, with the one that is on its way, and of those that are still where they were.
    """

    def __init__(self, weights: list[torch.Tensor]):
        super().__init__()
        self.weights, self.were = weights, {w.untyped_storage().data_ptr() for w in weights}
        self.filled = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.filled += args[0].nbytes
            left = sum(w.nbytes for w in self.weights if w.untyped_storage().data_ptr() in self.were)
            self.most = max(self.most, self.filled + left)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('way', WAYS)
def test_no_more_than_one_weight_is_there_twice(way):
    model = Teacher()
    weights = list(model.parameters())
    total, largest = sum(w.nbytes for w in weights), max(w.nbytes for w in weights)
    with Filling(weights) as filling:
        WAYS[way](model)
    assert filling.filled == total and filling.most <= total + largest


@pytest.mark.parametrize('way', WAYS)
def test_pinned_as_it_is(monkeypatch, way):
    """``pin_memory()`` takes a power of two of bytes for each tensor."""
    pinned = {}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    register = lambda place, size, flags: pinned.update({place: size}) or 0  # noqa: E731
    monkeypatch.setattr(torch.cuda, 'cudart', lambda: SimpleNamespace(cudaHostRegister=register))
    model = Teacher()
    copy = WAYS[way](model)
    ((start, size),) = pinned.items()
    assert size == copy.memory.bytes == sum(rounded(w.nbytes) for w in model.parameters())
    assert all(start <= w.data_ptr() < start + size for w in model.parameters())


def test_memory_that_cannot_be_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'cudart', lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    with pytest.raises(OptionError, match=r'GiB of host memory cannot be pinned \(cudaHostRegister returns 2\)'):
        HostCopy(Teacher().parameters(), CPU)


def test_too_little_memory(monkeypatch):
    weights = [torch.empty(3 << 28, dtype=torch.uint8, device='meta')]
    monkeypatch.setattr(host_memory, 'available_bytes', lambda: 1 << 29)
    with pytest.raises(OptionError, match=r'1 x 0.75 GiB of teacher .* take 0.75 GiB more .* 0.50 GiB are available'):
        HostMemory([weights])
    assert weights[0].is_meta


def test_weights_on_the_host_make_room_for_themselves(monkeypatch):
    monkeypatch.setattr(host_memory, 'available_bytes', lambda: 1 << 20)
    weight = nn.Parameter(torch.ones(1 << 22), requires_grad=False)
    HostMemory([[weight]])
    assert weight.eq(1).all()


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace('__', '.')).write_text(str(text))


GIB = 1 << 30


@pytest.mark.parametrize(
    ('cgroup', 'folder', 'files', 'expected'),
    [
        ('0::/job/task\n', 'job', dict(memory__max=8 * GIB, memory__current=7 * GIB), 3),  # a parent's limit
        ('0::/job/task\n', 'job/task', dict(memory__max='max', memory__current=7 * GIB), 20),
        ('0::/not/here\n', '.', dict(memory__max=8 * GIB, memory__current=4 * GIB), 6),  # inside a container
        ('4:cpu,memory:/a\n0::/\n', 'memory/a', dict(memory__limit_in_bytes=8 * GIB, memory__usage_in_bytes=5 * GIB), 5),
        ('4:memory:/a\n', 'memory/a', dict(memory__limit_in_bytes=1 << 62, memory__usage_in_bytes=5 * GIB), 20),
        ('4:memory:/a\n', 'memory/a', dict(memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=5 * GIB), 0),
        ('', '.', {}, 20),
    ],
)
def test_available(tmp_path, cgroup, folder, files, expected):
    """Of the smallest limit; 2 GiB of what is used are caches of files."""
    write(tmp_path / 'proc', meminfo=f'MemTotal: 30000000 kB\nMemAvailable: {20 * GIB // 1024} kB\nOdd:\n')
    write(tmp_path / 'proc' / 'self', cgroup=cgroup)
    stat = ''.join(f'{prefix}{kind}_file {GIB}\n' for prefix in ('', 'total_') for kind in ('active', 'inactive'))
    write(tmp_path / 'sys' / folder, **files, memory__stat=stat)
    assert available_bytes(tmp_path / 'proc', tmp_path / 'sys') == expected * GIB


def test_nobody_says_what_is_available(tmp_path):
    assert available_bytes(tmp_path, tmp_path) is None


# ---- two ranks ----


NO_FILE = '00:00', '0'


def inode_of(tensor: torch.Tensor) -> tuple[str, str]:
    """Device and inode of the memory that a tensor is in."""
    with open('/proc/self/maps') as maps:
        for line in maps:
            start, end = (int(place, 16) for place in line.split()[0].split('-'))
            if start <= tensor.data_ptr() < end:
                return tuple(line.split()[3:5])


CASES = ('equal', 'others', 'sharded', 'cannot be opened', 'too little')


def in_a_rank(rank: int, folder) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    found = {}
    for case in CASES:
        with pytest.MonkeyPatch.context() as patched:
            found[case] = in_a_case(case, rank, patched)
    torch.save(found, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def in_a_case(case: str, rank: int, patched: pytest.MonkeyPatch) -> dict[str, dict]:
    if case == 'cannot be opened' and rank == 1:

        def refuse(*_):
            raise PermissionError('no entry')

        patched.setattr(host_memory, 'open', refuse, raising=False)
    if case == 'too little':
        patched.setattr(host_memory, 'available_bytes', lambda: 100)
        patched.setattr(host_memory, '_given_back', lambda weights: 0)
    found = {}
    for way, make in WAYS.items():
        said = []
        patched.setattr(get_logger(), 'warning', said.append)
        model = Teacher(rank if case == 'others' else 0).requires_grad_(False)
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
        expected = model(x)
        try:
            copy = make(model, None if case == 'sharded' else 'whole')
        except OptionError as error:
            found[way] = {'error': str(error)}
            continue
        equal = []
        for _ in range(2):
            with copy.on_device():
                equal.append(torch.equal(model(x), expected))
        memory = copy.memory
        found[way] = {'equal': all(equal), 'inodes': {inode_of(w) for w in model.parameters()}, 'bytes': memory.bytes, 'said': said}
        found[way] |= {'ranks': memory.ranks, 'called': str(memory)}
    return found


@pytest.fixture(scope='module')
def both(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(in_a_rank, (folder,), nprocs=2)
    return [torch.load(folder / f'{rank}.pt', weights_only=False) for rank in range(2)]


@pytest.mark.parametrize('way', WAYS)
def test_ranks_share_a_copy(both, way):
    first, second = (rank['equal'][way] for rank in both)
    assert first['equal'] and second['equal'] and first['said'] == second['said'] == []
    assert first['ranks'] == second['ranks'] == 2 and 'shared by 2 ranks' in first['called']
    assert len(first['inodes']) == 1 and first['inodes'] == second['inodes'] != {NO_FILE}
    assert first['bytes'] == sum(rounded(w.nbytes) for w in Teacher().parameters())


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('case', ['others', 'sharded', 'cannot be opened'])
def test_ranks_that_keep_copies_of_their_own(both, case, way):
    for rank in both:
        one = rank[case][way]
        assert one['equal'] and one['ranks'] == 1 and one['inodes'] == {NO_FILE}
        assert len(one['said']) == (case == 'cannot be opened')
    if case == 'cannot be opened':
        (line,) = both[1][case][way]['said']
        assert line.startswith('2 ranks of this machine cannot share') and '(no entry)' in line and '0.00 GiB instead of 0.00' in line


def test_every_rank_says_that_there_is_too_little(both):
    assert all('1 x 0.00 GiB of teacher' in rank['too little']['model']['error'] for rank in both)
