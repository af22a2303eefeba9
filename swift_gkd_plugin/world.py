"""The ranks of a run, of which a run without torch.distributed has one."""

from __future__ import annotations

from typing import Any, TypeVar

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
