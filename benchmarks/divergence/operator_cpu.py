"""Time and memory of one distillation step's head and loss, forward and backward, on a CPU.

    python benchmarks/divergence/operator_cpu.py --out results.csv            # run
    python benchmarks/divergence/operator_cpu.py --plot results.csv plot.png  # draw

Implementations: `matmuls`, the four matrix products alone (both sides' logits and their gradient whole, gradient of
hidden states and head), the floor that the others are divided by; `ours`, reduction='sum'; `ms-swift`, `trl`, `liger`,
their JSD behind a linear layer or fused with it. What is not installed, or needs more memory than there is, is left out.
Each measurement has a process of its own, of which the second step counts; the implementations take turns, and medians
are reported, so that a slow minute of the machine falls on all of them.

Seconds are wall time. On a machine that others use, too, run with `--threads 1 --ratio cpu_seconds`, the processor time
of the step. Memory is the peak of the process above what it held before the step, inputs included.
"""

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

IMPLEMENTATIONS = ('matmuls', 'ours', 'ms-swift', 'trl', 'liger')
BETA, TEMPERATURE = 0.5, 0.9


def status_kb(field: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field + ':'):
            return int(line.split()[1])
    raise KeyError(field)


def available_bytes() -> int:
    for line in Path('/proc/meminfo').read_text().splitlines():
        if line.startswith('MemAvailable:'):
            return int(line.split()[1]) * 1024
    raise KeyError('MemAvailable')


def make_step(name: str, hs, ws, ht, wt):
    """A function that leaves gradients in hs.grad, and in ws.grad if it is trained, and returns the mean loss."""
    import torch

    tokens = len(hs)
    if name == 'matmuls':

        def step():
            with torch.no_grad():
                zt = ht @ wt.t()
            zs = hs @ ws.t()
            zs.backward(torch.full_like(zs, 1e-3))
            del zt
            return float('nan')

        return step
    if name == 'ours':
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from swift_gkd_plugin.divergence import Divergence, implementations, linear_divergence

        implementations.COMPILED_AFTER = 0  # as in the middle of a run

        def loss_of():
            return linear_divergence(hs, ws, ht, wt, Divergence('jsd', BETA, TEMPERATURE), reduction='sum') / tokens
    elif name == 'ms-swift':
        from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

        def loss_of():
            with torch.no_grad():
                teacher = (ht @ wt.t())[None]
            labels = torch.zeros(1, tokens, dtype=torch.long)
            total, count = gkd_loss((hs @ ws.t())[None], TeacherOutput(full_logits=teacher), labels, BETA, TEMPERATURE)
            return total / count
    elif name == 'trl':
        from trl.experimental.gkd import GKDTrainer

        def loss_of():
            with torch.no_grad():
                teacher = (ht @ wt.t())[None]
            return GKDTrainer.generalized_jsd_loss((hs @ ws.t())[None], teacher, beta=BETA, temperature=TEMPERATURE) / tokens
    else:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # Compiled by default, which on a CPU takes longer than it saves.
        liger = LigerFusedLinearJSDLoss(beta=BETA, temperature=TEMPERATURE, compiled=False, weight_hard_loss=0.0, weight_soft_loss=1.0)

        def loss_of():
            return liger(hs, ws, ht, wt, torch.zeros(tokens, dtype=torch.long))

    def step():
        loss = loss_of()
        loss.backward()
        return float(loss.detach())

    return step


def worker(name: str, tokens: int, hidden: int, vocab: int, dtype: str, threads: int) -> dict:
    import torch

    torch.set_num_threads(threads)
    most = int(0.9 * available_bytes())
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))  # an error instead of a machine out of memory
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    hs = torch.randn(tokens, hidden, generator=generator).to(kind).requires_grad_()
    ws = torch.randn(vocab, hidden, generator=generator).mul_(0.02).to(kind).requires_grad_()
    ht = torch.randn(tokens, hidden, generator=generator).to(kind)
    wt = torch.randn(vocab, hidden, generator=generator).mul_(0.02).to(kind)
    step = make_step(name, hs, ws, ht, wt)
    # As in training, where all but the first step find kernels compiled and memory that the machine has used before: a
    # virtual one may have to ask its host for each page that it has not, which takes ten times as long.
    step()
    hs.grad = ws.grad = None
    Path('/proc/self/clear_refs').write_text('5')
    before = status_kb('VmRSS')
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = step()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        'seconds': seconds,
        'cpu_seconds': cpu_seconds,
        'extra_gb': (status_kb('VmHWM') - before) * 1024 / 1e9,
        'loss': loss,
    }


def measure(args) -> None:
    rows = []
    for dtype in args.dtypes:
        for tokens in args.tokens:
            found = {}
            for _ in range(args.repeats):
                for name in args.implementations:
                    if tokens > args.others_up_to and name not in ('matmuls', 'ours'):
                        continue
                    if found.get(name) is not None and found[name] == []:
                        continue
                    command = [
                        sys.executable,
                        __file__,
                        '--worker',
                        name,
                        '--tokens',
                        str(tokens),
                        '--hidden',
                        str(args.hidden),
                        '--vocab',
                        str(args.vocab),
                        '--dtypes',
                        dtype,
                        '--threads',
                        str(args.threads),
                    ]
                    done = subprocess.run(command, capture_output=True, text=True)
                    found.setdefault(name, [])
                    if done.returncode == 0:
                        found[name].append(json.loads(done.stdout.splitlines()[-1]))
                    else:
                        reason = (done.stderr.splitlines() or ['killed'])[-1]
                        print(f'{name}: left out, {reason}', file=sys.stderr)
            floor = statistics.median(r[args.ratio] for r in found['matmuls'])
            for name, runs in found.items():
                if runs:
                    median = {key: statistics.median(r[key] for r in runs) for key in ('seconds', 'cpu_seconds', 'extra_gb')}
                    rows.append(
                        {
                            'implementation': name,
                            'dtype': dtype,
                            'tokens': tokens,
                            'hidden': args.hidden,
                            'vocab': args.vocab,
                            'threads': args.threads,
                            'repeats': len(runs),
                            **{key: round(value, 3) for key, value in median.items()},
                            'ratio_of': args.ratio,
                            'ratio_to_matmuls': round(median[args.ratio] / floor, 3),
                            'mean_loss': runs[0]['loss'],
                        }
                    )
                    print(rows[-1], flush=True)
    if args.out:
        with open(args.out, 'w', newline='') as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


def plot(source: str, target: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    with open(source) as file:
        rows = list(csv.DictReader(file))

    panels = list(dict.fromkeys(row['dtype'] for row in rows))
    figure, axes = plt.subplots(len(panels), 2, figsize=(11, 4 * len(panels)), squeeze=False)
    for line, title in zip(axes, panels, strict=True):
        for axis, field, label in (
            (line[0], rows[0]['ratio_of'], f'{rows[0]["ratio_of"]} per step'),
            (line[1], 'extra_gb', 'extra peak memory, GB'),
        ):
            for name in IMPLEMENTATIONS:
                points = sorted((int(r['tokens']), float(r[field])) for r in rows if r['implementation'] == name and r['dtype'] == title)
                if points:
                    axis.plot(*zip(*points, strict=True), marker='o', label=name)
            axis.set(xscale='log', yscale='log', xlabel='tokens', ylabel=label, title=title)
            axis.set_xticks(sorted({int(r['tokens']) for r in rows}))
            axis.xaxis.set_major_formatter('{x:.0f}')
            axis.yaxis.set_major_formatter('{x:g}')
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
    sizes = f'hidden {rows[0]["hidden"]}, vocabulary {rows[0]["vocab"]}, {rows[0]["threads"]} CPU threads'
    figure.suptitle(f'Output heads + JSD, forward and backward: {sizes}')
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--implementations', nargs='+', default=IMPLEMENTATIONS)
    parser.add_argument('--tokens', nargs='+', type=int, default=[256, 1024, 8192])
    parser.add_argument('--hidden', type=int, default=512)
    parser.add_argument('--vocab', type=int, default=151936)
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out')
    parser.add_argument('--plot', nargs=2, metavar=('CSV', 'PNG'))
    parser.add_argument('--worker', help=argparse.SUPPRESS)
    parser.add_argument('--others-up-to', type=int, default=1024, help='tokens up to which implementations with whole logits are run')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--ratio', choices=['seconds', 'cpu_seconds'], default='seconds')
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.tokens[0], args.hidden, args.vocab, args.dtypes[0], args.threads)))
    elif args.plot:
        plot(*args.plot)
    else:
        measure(args)


if __name__ == '__main__':
    main()
