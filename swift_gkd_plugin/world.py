"""The ranks of a run, of which a run without torch.distributed has one."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar('T')


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_all(thing: T, group: Any = None) -> list[T]:
    """What each rank of a group says, of all ranks without one, in their order: picklable, and small, for it is on every rank as often as
    there are ranks, each as large as the largest. A collective call."""
    if world_size() == 1:
        return [thing]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, thing, group=group)
    return found


def exchange_objects(outgoing: list[Any], device: torch.device, group: Any = None) -> list[Any]:
    """One picklable object to each rank of a group, of all ranks without one, and one from each; a rank's own stays as it is. Each travels
    in its own size. A collective call.

    Args:
        device: Where the tensors of a collective call have to be.
    """
    mine = dist.get_rank(group)
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
