"""A vocabulary sharded over gloo ranks gives the unsharded loss, gradients and statistics, uneven shards included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize('world', [2, 4])
def test_sharded_vocabulary(world, tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name('sharded_worker.py')),
                str(rank),
                str(world),
                f'file://{tmp_path}/store',
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        errors = [rank.communicate(timeout=150)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), '\n'.join(errors)


def test_d11_local_alignment_of_shards_is_wrong_in_stock():
    """ms-swift aligns each rank's columns by their local number: identical models, 152 against 160 rows, are far
    apart."""
    stock = pytest.importorskip('swift.rlhf_trainers.gkd_loss')
    torch.manual_seed(1)
    logits = torch.randn(8, 152) * 4
    padded = torch.cat([logits, torch.full((8, 8), -20.0)], 1)
    for world, apart in ((1, False), (2, True), (4, True)):
        aligned = [stock._align_vocab(s, t) for s, t in zip(logits.chunk(world, -1), padded.chunk(world, -1), strict=True)]
        student, teacher = (torch.log_softmax(torch.cat(side, -1), -1) for side in zip(*aligned, strict=True))
        kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
        assert (kl > 1) == apart
