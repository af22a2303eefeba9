"""Time and memory of one distillation step's head and loss, forward and backward, on an NVIDIA GPU.

    python benchmarks/divergence/operator_gpu.py --out results.csv            # run
    python benchmarks/divergence/operator_gpu.py --plot results.csv plot.png  # draw

The implementations are those of `operator_cpu.py`, with a trained head (`trained`) and one that only passes the gradient
on (`frozen`). Each measurement has a process of its own: two steps to warm up, then the median of `--repeats`, by the
GPU's own clock. Memory is the peak of torch's allocator above what it held before the step, without the gradients that
were asked for. What is not installed, or needs more memory than there is, is left out.
"""

import itertools
import json
import statistics
import subprocess
import sys

from operator_cpu import make_parser, make_step, plot, write

HEADS = ('trained', 'frozen')
WARM_UP = 2


def worker(name: str, head: str, tokens: int, hidden: int, vocab: int, dtype: str, repeats: int) -> dict:
    import torch

    generator = torch.Generator(device='cuda').manual_seed(0)

    def random(rows: int, size: float) -> torch.Tensor:
        return torch.randn(rows, hidden, device='cuda', generator=generator).mul_(size).to(getattr(torch, dtype))

    hs, ws = random(tokens, 1).requires_grad_(), random(vocab, hidden**-0.5).requires_grad_(head == 'trained')
    ht, wt = random(tokens, 1), random(vocab, hidden**-0.5)
    gradients = sum(x.numel() * x.element_size() for x in (hs, ws) if x.requires_grad)
    step, seconds, extra = make_step(name, hs, ws, ht, wt), [], 0
    for _ in range(WARM_UP + repeats):
        hs.grad = ws.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        loss = step()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
        extra = max(extra, torch.cuda.max_memory_allocated() - before - gradients)
    return {'seconds': statistics.median(seconds[WARM_UP:]), 'extra_gb': extra / 1e9, 'loss': loss}


def measure(args) -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit('operator_gpu.py: torch sees no GPU; operator_cpu.py measures on a CPU')
    rows = []
    for dtype, head, tokens in itertools.product(args.dtypes, args.heads, args.tokens):
        floor = None
        for name in ('matmuls', *(name for name in args.implementations if name != 'matmuls')):
            options = {'--worker': name, '--heads': head, '--tokens': tokens, '--hidden': args.hidden}
            options |= {'--vocab': args.vocab, '--dtypes': dtype, '--repeats': args.repeats}
            command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                reason = (done.stderr.splitlines() or ['killed'])[-1]
                print(f'{name}, {head} head, {tokens} tokens: left out, {reason}', file=sys.stderr)
                if name == 'matmuls':
                    break  # nothing to divide by
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            floor = floor or found['seconds']
            rows.append(
                {
                    'implementation': name,
                    'head': head,
                    'dtype': dtype,
                    'tokens': tokens,
                    'hidden': args.hidden,
                    'vocab': args.vocab,
                    'device': torch.cuda.get_device_name(),
                    'repeats': args.repeats,
                    'seconds': round(found['seconds'], 5),
                    'extra_gb': round(found['extra_gb'], 3),
                    'ratio_of': 'seconds',
                    'ratio_to_matmuls': round(found['seconds'] / floor, 3),
                    'mean_loss': found['loss'],
                }
            )
            print(rows[-1], flush=True)
    if args.out and rows:
        write(rows, args.out)


def main() -> None:
    parser = make_parser(__doc__, [1024, 8192], 4096, ['bfloat16'], 10)
    parser.add_argument('--heads', nargs='+', choices=HEADS, default=HEADS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.heads[0], args.tokens[0], args.hidden, args.vocab, args.dtypes[0], args.repeats)))
    elif args.plot:
        plot(*args.plot)
    else:
        measure(args)


if __name__ == '__main__':
    main()
