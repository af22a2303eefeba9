"""Bars from the CSV files of this directory, each as a PNG file of its name: ``python benchmarks/training/plot.py``."""

from __future__ import annotations

import csv
from pathlib import Path

HERE = Path(__file__).resolve().parent

# file: (columns that name a bar, measured columns with their axis labels)
FIGURES = {
    'step': (('implementation', 'dtype'), {'seconds': 'seconds per step', 'above_weights_gb': 'GB above the weights'}),
    'modes': (('answers', 'by'), {'seconds_per_step': 'seconds per step'}),
    'waiting': (
        ('mode', 'plugin'),
        {
            'seconds_per_step': 'seconds per step',
            'waits_per_step': 'of which the student waits',
            'cpu_seconds_per_step': 'seconds of a core',
        },
    ),
    'self_distillation': (('way',), {'seconds': 'seconds per step', 'peak_gb': 'GB, weights included'}),
}


def draw(name: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names, measured = FIGURES[name]
    with open(HERE / f'{name}.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    labels = [', '.join(row[column] for column in names) for row in rows]
    figure, axes = plt.subplots(1, len(measured), figsize=(3 + 4 * len(measured), 0.8 + 0.4 * len(rows)), sharey=True, squeeze=False)
    for axis, (column, label) in zip(axes[0], measured.items(), strict=True):
        bars = axis.barh(labels, [float(row[column]) for row in rows], color='#4878a8')
        axis.bar_label(bars, padding=3)
        axis.margins(x=0.15)
        axis.set_xlabel(label)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(HERE / f'{name}.png', dpi=120)


if __name__ == '__main__':
    for name in FIGURES:
        draw(name)
