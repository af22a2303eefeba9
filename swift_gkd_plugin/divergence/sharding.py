"""A vocabulary that is split over the ranks of a group, as in tensor parallelism.

Every rank holds consecutive rows of both heads, in rank order. The shards may be uneven, and the two heads may be split
at different ids (151936 and 152064 rows over 4 ranks, say): the student's split decides, and the few rows of the
teacher's head that lie on another rank are sent there once per call. Weights move, not logits: they do not grow with
the tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Reduce:
    """Reductions over the group; without a group the tensor itself."""

    group: dist.ProcessGroup | None = None

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def gather(self, x: Tensor) -> Tensor:
        """[ranks, *shape]."""
        if self.group is None:
            return x[None]
        found = x.new_empty(dist.get_world_size(self.group), *x.shape)
        dist.all_gather(list(found), x.contiguous(), group=self.group)
        return found

    def min(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MIN)

    def _reduce(self, x: Tensor, op) -> Tensor:
        if self.group is not None:
            whole = x.contiguous()  # a collective takes a view's memory as it lies
            dist.all_reduce(whole, op=op, group=self.group)
            if whole is not x:
                x.copy_(whole)
        return x


@dataclass(frozen=True)
class Vocabulary:
    """The ids that both sides are normalised over, and which of them are columns of this rank."""

    size: int
    columns: int  # of this rank
    first_id: int  # of this rank
    widest: int  # columns of the rank that has most: what all ranks must choose alike is chosen from that
    reduce: Reduce

    @classmethod
    def whole(cls, size: int) -> 'Vocabulary':
        return cls(size, size, 0, size, Reduce())

    @classmethod
    def shard(cls, size: int, widths: list[int], group) -> 'Vocabulary':
        """widths: rows of the student's head on each rank. The error for a rank without any of the `size` ids is raised on all
        ranks, so that none waits for it."""
        out = spans(widths, size)
        for rank, (first, last) in enumerate(out):
            if first == last:
                raise ValueError(
                    f'rank {rank} of vocab_group holds the ids from {sum(widths[:rank])} on, none of the {size} that both sides have'
                )
        first, last = out[dist.get_rank(group)]
        return cls(size, last - first, first, max(last - first for first, last in out), Reduce(group))

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(columns of this rank, 0 where an id has none here; whether it has one)."""
        column = ids - self.first_id
        here = (column >= 0) & (column < self.columns)
        return column.masked_fill(~here, 0), here


def shard_widths(group, widths: list[int], device: torch.device) -> list[list[int]]:
    """The rows that every rank of the group has of each of several heads, a list per head. They are asked for in every call, and read
    on the host: a rank that remembered those of its own widths would not see that another's have changed, and go on while that one
    waits."""
    return Reduce(group).gather(torch.tensor(widths, device=device)).t().tolist()


def on_all_ranks(group, here: bool, device: torch.device) -> bool:
    """Whether something that is true or not of this process is true of all in the group, which ask at the same time."""
    return bool(Reduce(group).min(torch.tensor(int(here), device=device))) if group is not None else here


def spans(widths: list[int], vocab_size: int) -> list[tuple[int, int]]:
    """The ids [first, last) of each rank, cut at vocab_size."""
    out, first = [], 0
    for width in widths:
        out.append((min(first, vocab_size), min(first + width, vocab_size)))
        first += width
    return out


def realigned(rows: Tensor, have: list[tuple[int, int]], want: list[tuple[int, int]], group) -> list[tuple[int, Tensor]]:
    """This rank's ids want[rank] of a tensor of which each rank holds have[rank]: pieces (first id, rows), in order.

    One all-to-all of the rows that lie elsewhere; none where every rank has what it wants. Rows that are here are
    views.
    """
    rank = dist.get_rank(group)
    first = have[rank][0]

    def overlap(a, b):
        return max(a[0], b[0]), min(a[1], b[1])

    sends = [overlap(have[rank], span) if other != rank else (0, 0) for other, span in enumerate(want)]
    receives = [overlap(span, want[rank]) if other != rank else (0, 0) for other, span in enumerate(have)]
    moves = any(lo < hi for h in range(len(have)) for w in range(len(want)) if h != w for lo, hi in [overlap(have[h], want[w])])
    pieces = []
    lo, hi = overlap(have[rank], want[rank])
    if lo < hi:
        pieces.append((lo, rows[lo - first : hi - first]))
    if moves:
        outgoing = [rows[lo - first : hi - first] if lo < hi else rows[:0] for lo, hi in sends]
        sizes = [max(hi - lo, 0) for lo, hi in receives]
        received = rows.new_empty(sum(sizes), *rows.shape[1:])
        dist.all_to_all_single(received, torch.cat(outgoing), sizes, [len(part) for part in outgoing], group=group)
        pieces += [(lo, part) for (lo, _), part in zip(receives, received.split(sizes), strict=False) if len(part)]
    return sorted(pieces, key=lambda piece: piece[0])
