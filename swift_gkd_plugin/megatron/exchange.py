"""Numbers and rows of tensors from rank to rank; objects are in :mod:`..world`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from swift.utils import get_current_device


def numbers_of_all(number: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """An integer of each rank of a group; of all ranks without one."""
    mine = torch.tensor([number], device=get_current_device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    return torch.cat(theirs).tolist()


def exchange_rows(outgoing: dict[int, torch.Tensor], expected: dict[int, int], like: torch.Tensor) -> dict[int, torch.Tensor]:
    """Rows from rank to rank, all ranks of the run at once.

    Args:
        outgoing: [n, dim] for each rank that gets something.
        expected: Number of rows from each rank that has something for this one.
        like: [0, dim], of the dtype and on the device of the rows.

    Returns:
        What arrived, by the rank that sent it.
    """
    ranks = range(dist.get_world_size())
    given, taken = ([rows.get(rank, 0) for rank in ranks] for rows in ({q: len(x) for q, x in outgoing.items()}, expected))
    received = like.new_empty(sum(taken), like.shape[1])
    dist.all_to_all_single(received, torch.cat([like, *(outgoing[q] for q in sorted(outgoing))]), taken, given)
    return {rank: part for rank, part in zip(ranks, received.split(taken), strict=True) if rank in expected}
