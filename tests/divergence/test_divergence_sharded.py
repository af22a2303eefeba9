"""A vocabulary sharded over gloo ranks gives the unsharded loss, gradients and statistics, uneven shards included."""

import pytest
import torch
from workers import run_worker


@pytest.mark.parametrize('world', [2, 4])
def test_sharded_vocabulary(world, tmp_path):
    run_worker('sharded_worker.py', f'file://{tmp_path}/store', ranks=world, cwd=tmp_path)


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
