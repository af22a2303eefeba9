"""What ranks send each other, in its own size: what torch gathers of objects is on every rank as often as there are ranks, each as large as
the largest."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist
from swift.utils import get_current_device


def numbers_of_all(number: int, group: dist.ProcessGroup | None = None) -> list[int]:
    """An integer of each rank of a group; of all ranks without one."""
    mine = torch.tensor([number], device=get_current_device())
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    return torch.cat(theirs).tolist()


def exchange_objects(outgoing: list[Any], group: dist.ProcessGroup) -> list[Any]:
    """One picklable object to each rank of a group and one from each; a rank's own stays as it is."""
    device, mine = get_current_device(), dist.get_rank(group)
    packed = [b'' if member == mine else pickle.dumps(thing) for member, thing in enumerate(outgoing)]
    sizes = torch.tensor([len(p) for p in packed], device=device)
    theirs = torch.empty_like(sizes)
    dist.all_to_all_single(theirs, sizes, group=group)
    theirs = theirs.tolist()
    sent = torch.frombuffer(bytearray(b''.join(packed) or b'\0'), dtype=torch.uint8)[: sum(map(len, packed))].to(device)
    received = torch.empty(sum(theirs), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, sent, theirs, [len(p) for p in packed], group=group)
    parts = received.cpu().split(theirs)
    return [
        thing if m == mine else pickle.loads(part.numpy().tobytes()) for m, (thing, part) in enumerate(zip(outgoing, parts, strict=True))
    ]


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
