"""What the operator's Triton kernels cost, counted in Hopper's machine code: no GPU is needed.

    python benchmarks/divergence/kernels.py            # count, and write kernels.csv
    python benchmarks/divergence/kernels.py --sass DIR # also leave the machine code there
    python benchmarks/divergence/kernels.py --check    # compare with kernels.csv, and fail where a count is larger

The operator runs over a real vocabulary on a CPU that is taken for a GPU (tests/divergence/pretended_gpu.py). Its kernels
are not run but compiled as that launch would have compiled them, and disassembled by the tools that Triton brings along.

kernels.csv has a row for each kernel of each case. A sweep's instructions are those of one turn of its loop, or of the way
through a program that has none, divided by the pairs of logits (student's and teacher's; one logit, where there is one side) that a
thread works on in it: with 132 multiprocessors at 1.7 GHz and 3.35 TB/s an H100 has time for about 8.6 instructions per
byte that is read or written. `launches` are all that a chunk takes beside its matrix products, torch's included. The rest
of the columns: registers and spilled bytes of a thread, bits of the widest access, bytes read and written per pair, four
logits at a time.
"""

import argparse
import csv
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests' / 'divergence'))
from pretended_gpu import PretendedGPU  # noqa: E402

from swift_gkd_plugin.divergence import Divergence, LogitTransform, TokenStats, _triton, linear_divergence, topk_divergence  # noqa: E402

TABLE = Path(__file__).with_suffix('.csv')
VOCAB, DIM, CHUNK = 151_936, 8, 3
FOUR_CHUNKS = 4 * CHUNK  # which share one product of their gradients
HOPPER = GPUTarget('cuda', 90, 32)
JSD = Divergence()


@dataclass
class Row:
    case: str
    kernel: str
    instructions_per_pair: float | None  # None: works on a few numbers per token
    registers: int
    spilled_bytes: int
    access_bits: int | None
    bytes_per_pair: float | None
    launches: float  # of the case
    triton: str = triton.__version__


# ---- which kernels a call starts ----


class _Hopper:
    """What Triton asks of a driver in order to compile."""

    get_current_target = staticmethod(lambda: HOPPER)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class _CountingGPU(PretendedGPU):
    """Whose matrix products are not counted."""

    def __init__(self, counter: '_Launches'):
        super().__init__()
        self.counter = counter

    def _product(self, *args, **kwargs):
        self.counter.paused += 1
        try:
            return super()._product(*args, **kwargs)
        finally:
            self.counter.paused -= 1


class _Launches(TorchDispatchMode):
    """The kernels that Triton and torch would start on a GPU."""

    # Views, memory that nothing is written to, and the collectives themselves.
    FREE = re.compile(r'empty|view|slice|select|detach|alias|as_strided|expand|squeeze|transpose|\.t\.|unbind|lift_fresh|is_same_size|c10d')

    def __init__(self):
        super().__init__()
        self.paused, self.torch, self.triton = 0, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.paused and not self.FREE.search(str(function)):
            self.torch.append(str(function))
        return function(*args, **(kwargs or {}))

    @property
    def all(self) -> list[str]:
        return self.torch + [kernel.__name__ for kernel, *_ in self.triton]


def launches(call, tokens: int) -> _Launches:
    """Those of call(tokens)."""
    found, run, works = _Launches(), triton.JITFunction.run, (_triton.works, _triton._one_load_works)

    def record(kernel, *args, grid, warmup, **options):
        found.triton.append((kernel, args, options))

    triton.JITFunction.run, _triton.works, _triton._one_load_works = record, lambda *args: True, lambda *args: True
    try:
        with _CountingGPU(found), found:
            call(tokens)
    finally:
        triton.JITFunction.run, (_triton.works, _triton._one_load_works) = run, works
    return found


# ---- what they are compiled to ----


def compiled(kernel: triton.JITFunction, args: tuple, options: dict):
    """The kernel as a launch with these arguments compiles it, for Hopper."""
    triton.runtime.driver.set_active(_Hopper())
    return kernel.run(*args, grid=(1,), warmup=True, **options)


@functools.cache  # cases share kernels
def disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, '-sass', '-res-usage', file.name], capture_output=True, text=True, check=True).stdout


def sweep_of(sass: str) -> list[str]:
    """The instructions of the loop over a row's columns; without one, those of the shortest way through the program, which leaves
    out what only the first and the last program of a row do, and waits for nothing."""
    lines = [(int(at, 16), text.strip()) for at, text in re.findall(r'^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);', sass, re.M)]
    number = {at: i for i, (at, _) in enumerate(lines)}
    jumps = {i: number[int(to[1], 16)] for i, (_, text) in enumerate(lines) if (to := re.search(r'\bBRA\b.* 0x([0-9a-f]+)', text))}
    loops = [lines[to : at + 1] for at, to in jumps.items() if to < at]
    rows = [loop for loop in loops if any('LDG.E.128' in text for _, text in loop)]
    if rows:
        return [text for _, text in max(rows, key=len)]
    before, todo = {0: None}, [0]
    for here in todo:  # breadth first
        text = lines[here][1]
        if text.startswith('EXIT'):
            way = []
            while here is not None:
                way, here = [lines[here][1], *way], before[here]
            return way
        goes_on = here not in jumps or text.startswith('@') or re.search(r'BRA !?U?P\d', text)
        for after in ([jumps[here]] if here in jumps else []) + ([here + 1] if goes_on else []):
            if after not in before:
                before[after] = here
                todo.append(after)
    raise ValueError('a program without an end')


def count(case: str, kernel: triton.JITFunction, args: tuple, options: dict, launched: int, keep: Path | None) -> Row:
    made = compiled(kernel, args, options)
    sass = disassembled(made.asm['cubin'])
    if keep is not None:
        (keep / f'{case} {kernel.__name__}.sass'.replace(' ', '_')).write_text(sass)
    block = options.get('BLOCK')
    usage = {name: int(number) for name, number in re.findall(r'(REG|STACK|LOCAL):(\d+)', sass)}
    spilled = usage['STACK'] + usage['LOCAL']
    if block is None:
        return Row(case, kernel.__name__, None, usage['REG'], spilled, None, None, launched)
    sweep, each = sweep_of(sass), block / (32 * made.metadata.num_warps)
    accesses = re.findall(r'(LDG|STG)\.E(?:\.\w*[A-Z])*(?:\.U?(\d+))?(?:\.\w*[A-Z])* ', '\n'.join(sweep))
    # A load of four logits, and a store of as many in half precision; what is narrower is of a row's own numbers.
    widths = [int(w) for way, w in accesses if w and int(w) >= (128 if way == 'LDG' else 64)] or [32]
    return Row(
        case,
        kernel.__name__,
        round(len(sweep) / each, 1),
        usage['REG'],
        spilled,
        max(widths),
        round(sum(w // 8 for w in widths) / each, 1),
        launched,
    )


# ---- the cases ----


def dense(divergence: Divergence, labels: bool = False, one_load: bool = False, vocab: int = VOCAB, **extra):
    torch.manual_seed(0)
    weight, head = torch.randn(2, vocab, DIM).bfloat16()

    def call(tokens: int) -> None:
        os.environ[_triton.ONE_LOAD] = str(int(one_load))
        hidden = torch.randn(tokens, DIM).bfloat16().requires_grad_()
        more = of_labels(tokens, extra.get('label_temperature', 1.0)) if labels else {}
        stats = TokenStats(detail=extra.get('detail', False))
        more |= {'vocab_group': group() if extra.get('sharded') else None}
        more |= {'student_transform': extra.get('transform'), 'stats': stats, 'reduction': 'sum', 'chunk_tokens': CHUNK}
        linear_divergence(hidden, weight, torch.randn(tokens, DIM).bfloat16(), head, divergence, **more)

    return call


def of_labels(tokens: int, temperature: float | None) -> dict:
    """Arguments. temperature: Of the labels; None: each has its own."""
    at = torch.ones(tokens) if temperature is None else temperature
    return {'labels': torch.zeros(tokens, dtype=torch.long), 'label_weights': torch.ones(tokens), 'label_temperature': at}


def group() -> dist.ProcessGroup:
    """Of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def few(
    k: int,
    labels: bool = False,
    divergence: Divergence = JSD,
    sharded: bool = False,
    taken_at: float | None = None,
    label_temperature: float | None = 1.0,
):
    """k log-probabilities of a teacher, or none of it."""
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, DIM).bfloat16()

    def call(tokens: int) -> None:
        hidden = torch.randn(tokens, DIM).bfloat16().requires_grad_()
        more = of_labels(tokens, label_temperature) if labels else {}
        more |= {'reduction': 'sum', 'chunk_tokens': CHUNK, 'vocab_group': group() if sharded else None}
        if k:
            topk = torch.randn(tokens, VOCAB).log_softmax(-1).topk(k)
            topk_divergence(hidden, weight, *topk, divergence, topk_temperature=taken_at, **more)
        else:
            linear_divergence(hidden, weight, None, None, divergence, **more)

    return call


CASES = {
    'jsd': dense(Divergence(temperature=0.9)),
    'jsd, 151665 columns': dense(Divergence(temperature=0.9), vocab=151_665),
    'jsd 0.2': dense(Divergence(beta=0.2)),
    'jsd 1e-3': dense(Divergence(beta=1e-3)),
    'jsd 0.999': dense(Divergence(beta=0.999)),
    'forward_kl': dense(Divergence('forward_kl')),
    'reverse_kl': dense(Divergence('reverse_kl')),
    'skew_forward_kl': dense(Divergence('skew_forward_kl')),
    'skew_reverse_kl': dense(Divergence('skew_reverse_kl')),
    'skew_forward_kl 0.999': dense(Divergence('skew_forward_kl', skew=0.999)),
    'skew_reverse_kl 0.999': dense(Divergence('skew_reverse_kl', skew=0.999)),
    'tvd': dense(Divergence('tvd')),
    'jsd, labels': dense(Divergence(temperature=0.9), labels=True),
    'jsd, label temperatures': dense(Divergence(temperature=0.9), labels=True, label_temperature=None),
    'jsd, labels, soft cap': dense(Divergence(temperature=0.9), labels=True, transform=LogitTransform(softcap=30.0)),
    'jsd, labels, detail': dense(Divergence(temperature=0.9), labels=True, detail=True),
    'jsd, labels, sharded': dense(Divergence(temperature=0.9), labels=True, sharded=True),
    'jsd, one load': dense(Divergence(temperature=0.9), one_load=True),
    'jsd 0.2, one load': dense(Divergence(beta=0.2), one_load=True),
    'forward_kl, one load': dense(Divergence('forward_kl'), one_load=True),
    'skew_reverse_kl, one load': dense(Divergence('skew_reverse_kl'), one_load=True),
    'jsd, labels, soft cap, one load': dense(
        Divergence(temperature=0.9), labels=True, one_load=True, transform=LogitTransform(softcap=30.0)
    ),
    'top-k': few(64),
    'top-k, labels': few(64, labels=True, divergence=Divergence(temperature=0.9)),
    'top-k, label temperatures': few(64, labels=True, divergence=Divergence(temperature=0.9), label_temperature=None),
    'top-k at 1, skew_forward_kl 0.999': few(64, divergence=Divergence('skew_forward_kl', temperature=0.9, skew=0.999), taken_at=1.0),
    'top-k, tvd, labels, sharded': few(64, labels=True, divergence=Divergence('tvd'), sharded=True),
    'cross-entropy': few(0, labels=True),
    'cross-entropy at 0.9': few(0, labels=True, divergence=Divergence(temperature=0.9)),
    'cross-entropy at 0.9, its own': few(0, labels=True, divergence=Divergence(temperature=0.9), label_temperature=0.9),
}


def measure(case: str, keep: Path | None = None) -> list[Row]:
    """The rows of a case; its kernels in the order of their launches."""
    ragged, one, two = (launches(CASES[case], tokens) for tokens in (FOUR_CHUNKS - 1, FOUR_CHUNKS, 2 * FOUR_CHUNKS))
    launched = (len(two.all) - len(one.all)) / 4
    rows, made = {}, {}
    for kernel, args, options in ragged.triton + two.triton:
        made.setdefault((kernel.__name__, str(options)), set()).add(compiled(kernel, args, options).hash)
        if (kernel.__name__, str(options)) not in rows:
            rows[kernel.__name__, str(options)] = count(case, kernel, args, options, round(launched, 1), keep)
    for (kernel, options), hashes in made.items():
        if len(hashes) > 1:
            sys.exit(f'{case}, {kernel}: compiled {len(hashes)} times for {options}, by tokens and where in memory they are')
    return list({str(row): row for row in rows.values()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--sass', type=Path, metavar='DIR')
    parser.add_argument('--cases', nargs='+', default=list(CASES), choices=list(CASES), metavar='CASE')
    args = parser.parse_args()
    if args.sass:
        args.sass.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in args.cases:
        for row in measure(case, args.sass):
            rows.append(asdict(row))
            print(*('-' if value is None else value for value in rows[-1].values()), sep='\t', flush=True)
    if args.check:
        sys.exit('\n'.join(check(rows)) or 0)
    if args.cases == list(CASES):
        with TABLE.open('w', newline='') as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)


def check(rows: list[dict]) -> list[str]:
    """What is larger than aimed at, or than it was with the same version of Triton."""
    with TABLE.open() as file:
        before = {(row['case'], row['kernel'], number): row for number, row in _numbered(csv.DictReader(file))}
    found = []
    for number, row in _numbered(rows):
        name = f'{row["case"]}, {row["kernel"]}'
        for column in ('instructions_per_pair', 'registers', 'spilled_bytes', 'bytes_per_pair', 'launches'):
            limit, value = AIMS[column](row), row[column] or 0
            was = before.get((row['case'], row['kernel'], number))
            if was is not None and was['triton'] == triton.__version__:
                limit = min(limit, float(was[column] or 0))
            if value > limit:
                found.append(f'{name}: {column} {value}, at most {limit}')
        if row['access_bits'] not in (None, 128):
            found.append(f'{name}: rows are read {row["access_bits"]} bits at a time')
    return found


def _numbered(rows):
    """Each row with how many of the same case and kernel went before."""
    seen = Counter()
    for row in rows:
        yield seen[row['case'], row['kernel']], row
        seen[row['case'], row['kernel']] += 1


AIMS = {
    # A JSD at 1/2 leaves an H200 waiting for memory too, the others an H100; so does one load of it for two sweeps fewer.
    'instructions_per_pair': lambda row: 104 if 'one load' in row['case'] else 62 if row['case'] in ('jsd', 'jsd, 151665 columns') else 80,
    'registers': lambda row: 128,  # with 256 threads a program two fit into a multiprocessor
    'spilled_bytes': lambda row: 0,
    'bytes_per_pair': lambda row: 10,
    'launches': lambda row: 8 if 'detail' not in row['case'] else 24,
}


if __name__ == '__main__':
    main()
