"""How long data-parallel ranks wait for each other and what is spent on padding, with rows as they come and balanced. No model runs.

python benchmarks/megatron/balance.py [--csv benchmarks/megatron/balance.csv]

Each of 8 ranks has 16 rows of a step. Prompts have 200 tokens; answers are drawn from an exponential distribution with mean 800, or a
log-normal one, cut at 4096. Counted are tokens that go through the student: of all ranks, of the slowest rank, which the others wait for,
and of the largest micro-batch, which decides about memory.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from swift_gkd_plugin.step.balance import Balancing, Told, arranged, size_of

RANKS, ROWS, STEPS = 8, 16, 50
ANSWERS = {
    'exponential, mean 800': lambda draw: draw.expovariate(1 / 800),
    'log-normal, median 500, sigma 1': lambda draw: draw.lognormvariate(6.2, 1.0),
}
HEADER = (
    'answers',
    'rows',
    'rows of a micro-batch',
    'how',
    'micro-batches of a rank',
    'tokens of all ranks',
    'tokens of the slowest rank / mean of the rows',
    'largest micro-batch',
)


def steps(answer) -> list[list[list[int]]]:
    """Lengths by step and rank."""
    draw = random.Random(0)
    return [[[200 + min(int(answer(draw)) + 1, 4096) for _ in range(ROWS)] for _ in range(RANKS)] for _ in range(STEPS)]


def measured(lengths, size: int, packed: bool, how: Balancing | None) -> tuple[float, ...]:
    counts = total = slowest = largest = useful = 0
    for step in lengths:
        told = [[list(map(Told, rows[n : n + size])) for n in range(0, ROWS, size)] for rows in step]
        found = None if how is None else arranged(told, how, packed)
        batches = [[[row.tokens for row in batch] for batch in of] for of in told]
        if found is not None:
            batches = [[[step[owner][number] for owner, number in batch] for batch in of] for of in found]
        sizes = [[size_of(batch, packed) for batch in of] for of in batches]
        counts += len(sizes[0])
        total += sum(map(sum, sizes))
        slowest += max(map(sum, sizes))
        largest = max(largest, *(max(of) for of in sizes))
        useful += sum(map(sum, step))
    return counts / STEPS, total / STEPS, slowest * RANKS / useful, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--csv', type=Path, default=Path(__file__).with_name('balance.csv'))
    rows = []
    for name, answer in ANSWERS.items():
        lengths = steps(answer)
        for packed in (True, False):
            for size in (1, 2, 4):
                for how, balancing in (('as they come', None), ('balanced', Balancing()), ('tokens 8192', Balancing(tokens=8192))):
                    count, total, slowest, largest = measured(lengths, size, packed, balancing)
                    kind = 'packed' if packed else 'padded'
                    rows.append((name, kind, size, how, f'{count:.1f}', f'{total:.0f}', f'{slowest:.2f}', largest))
                    print(*rows[-1], sep='\t')
    with parser.parse_args().csv.open('w', newline='') as file:
        csv.writer(file).writerows([HEADER, *rows])


if __name__ == '__main__':
    main()
