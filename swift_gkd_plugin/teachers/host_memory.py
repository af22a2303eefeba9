"""Frozen weights in host memory: one block for all of them, and one copy for all ranks of a machine that hold the same. And room there
for what leaves the device while they visit.

A block is mapped, filled weight by weight, and only then pinned: its pages exist from when they are filled, and each weight lets go of
where it was as soon as it is there, so that no more than one weight is there twice. ``pin_memory()`` would round every weight up to a
power of two.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from ..arguments import OptionError
from ..world import from_all, this_rank


class Places:
    """Where tensors of any shape and dtype lie in a block of bytes, each with its own strides.

    Attributes:
        bytes: Of the block.
    """

    ALIGNMENT = 256  # as the allocator of CUDA aligns: kernels load 16 bytes at a time, or fall back

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self._tensors, self.bytes = [], 0
        for tensor in tensors:
            self._tensors.append((self.bytes, torch.empty_like(tensor.data, device='meta')))
            self.bytes += -(-tensor.nbytes // self.ALIGNMENT) * self.ALIGNMENT

    def within(self, block: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a block."""
        return [block[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride()) for start, like in self._tensors]


@dataclass(frozen=True)
class Purpose:
    """What host memory is for, in the words of an error: the option, what is kept, and what to do instead."""

    option: str
    kept: str
    instead: str


TEACHER = Purpose('--gkd_teacher_offload', 'teacher', 'use --teacher_model_server, or fewer ranks per machine')


@dataclass(frozen=True)
class Holding:
    """What a rank is about to keep.

    Attributes:
        machine: Whose processes see each other; ranks on others have other memory.
        key: Equal on ranks that hold the same weights.
        bytes: Of a copy.
        given_back: Bytes of host memory that become free as the copy is filled.
        available: Bytes that the machine, or its container, has left; None if it does not say.
    """

    machine: str
    key: Hashable
    bytes: int
    given_back: int
    available: int | None

    def sharers(self, everyone: list[Holding]) -> list[int]:
        """Ranks of the same machine with the same weights."""
        return [rank for rank, one in enumerate(everyone) if (one.machine, one.key) == (self.machine, self.key)]


class HostMemory:
    """Weights that live on the host from now on. A collective call of all ranks of the run.

    Args:
        groups: Of weights, each of which is to be in one piece. They point there afterwards.
        replica: Ranks that give the same hold the same weights, and share a copy where they are on one machine. None for nobody.

    Attributes:
        places: Of each group in its block.
        blocks: One per group, pinned where there is a GPU.
        bytes: Of this copy.
        ranks: How many share it.

    Raises:
        OptionError: On every rank, if a machine has too little memory.
    """

    def __init__(self, groups: list[list[torch.Tensor]], replica: Hashable = None):
        self.places = [Places(group) for group in groups]
        self.bytes = sum(places.bytes for places in self.places)
        weights = list(chain.from_iterable(groups))
        rank = this_rank()
        key = rank if replica is None else (replica, _fingerprint(weights))
        everyone = from_all(Holding(_machine(), key, self.bytes, _given_back(weights), available_bytes()))
        whole, everyone = _shared_block(everyone, rank)
        check_fits(everyone)
        sharers = everyone[rank].sharers(everyone)
        self.ranks, fills = len(sharers), rank == sharers[0]
        whole = _mapped(-1, self.bytes) if whole is None else whole
        self.blocks = list(whole[: self.bytes].split([places.bytes for places in self.places]))
        there = list(chain.from_iterable(places.within(block) for places, block in zip(self.places, self.blocks, strict=True)))
        if not fills:
            for weight, place in zip(weights, there, strict=True):
                weight.data = place
        from_all(None)  # now there is no more than one of the copies that have been loaded
        if fills:
            for weight, place in zip(weights, there, strict=True):
                weight.data = place.copy_(weight.data)
        from_all(None)
        _pin(whole)

    def __str__(self) -> str:
        return f'{self.bytes / 2**30:.2f} GiB of host memory' + (f', shared by {self.ranks} ranks' if self.ranks > 1 else '')


class HostRoom:
    """Pinned host memory of this rank alone, for tensors that leave the device for a while.

    Args:
        purpose: Of it.
        bytes: That are expected to leave, at most; the room grows if it turns out to be more.
    """

    def __init__(self, purpose: Purpose, bytes: int = 0):
        self.purpose, self.bytes, self._block = purpose, bytes, None

    def check_fits(self) -> None:
        """A collective call of all ranks of the run.

        Raises:
            OptionError: On every rank, if a machine has too little memory.
        """
        check_fits(from_all(Holding(_machine(), this_rank(), self.bytes, 0, available_bytes())), self.purpose)

    def places(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Tensors like these, in the room; those of an earlier call are no longer valid."""
        places = Places(tensors)
        if self._block is None or self._block.numel() < places.bytes:
            if self._block is not None:
                _unpin(self._block)
            self._block = _mapped(-1, max(self.bytes, places.bytes))
            _pin(self._block, self.purpose)
        return places.within(self._block)


def check_fits(everyone: list[Holding], purpose: Purpose = TEACHER) -> None:
    """Raises:
    OptionError: The copies of a machine take more than it has left.
    """
    for machine in dict.fromkeys(one.machine for one in everyone):
        ranks = [one for one in everyone if one.machine == machine]
        copies = {one.key: one.bytes for one in ranks}
        needed = sum(copies.values()) - sum(one.given_back for one in ranks)
        available = min((one.available for one in ranks if one.available is not None), default=needed)
        if needed > available:
            raise OptionError(
                f'{purpose.option}: {len(copies)} x {max(copies.values()) / 2**30:.2f} GiB of {purpose.kept} on a machine take '
                f'{needed / 2**30:.2f} GiB more of host memory than now, and {available / 2**30:.2f} GiB are available; '
                f'{purpose.instead}.'
            )


def available_bytes(proc: Path = Path('/proc'), groups: Path = Path('/sys/fs/cgroup')) -> int | None:
    """What the machine has left, and the container: caches of files count as free. None where nobody says."""
    found = []
    with contextlib.suppress(OSError):
        found.append(1024 * int(_fields(proc / 'meminfo')['MemAvailable:']))
    with contextlib.suppress(OSError):
        for line in (proc / 'self' / 'cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            if controllers == '':
                root, names = groups, ('memory.max', 'memory.current', 'inactive_file', 'active_file')
            elif 'memory' in controllers.split(','):
                root, names = (
                    groups / 'memory',
                    ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file', 'total_active_file'),
                )
            else:
                continue
            inner = root / path.strip('/')
            for group in (inner, *inner.parents[: len(inner.relative_to(root).parts)]):
                with contextlib.suppress(
                    OSError, ValueError
                ):  # the root has no limit; "max" is none; inside a container only the root is there
                    limit, used = (int((group / name).read_text()) for name in names[:2])
                    stat = _fields(group / 'memory.stat')
                    found.append(max(limit - used + sum(int(stat.get(name, 0)) for name in names[2:]), 0))
    return min(found, default=None)


def _fields(file: Path) -> dict[str, str]:
    return dict(fields[:2] for fields in map(str.split, file.read_text().splitlines()) if len(fields) > 1)


def _given_back(weights: list[torch.Tensor]) -> int:
    """Bytes that become free when the weights live elsewhere. Of those that are on the host some may be pages of a checkpoint's file, which
    are free anyway and no part of the process's own memory."""
    on_host = {w.data_ptr(): w.nbytes for w in weights if w.device.type == 'cpu'}
    try:
        own = 1024 * int(_fields(Path('/proc/self/status'))['RssAnon:'])
    except (OSError, KeyError):
        return sum(on_host.values())
    return min(sum(on_host.values()), own)


def _machine() -> str:
    """Of whose processes this one can see the open files: one kernel, one namespace of process ids."""
    try:
        return Path('/proc/sys/kernel/random/boot_id').read_text().strip() + os.readlink('/proc/self/ns/pid')
    except OSError:
        return secrets.token_hex(8)


def _fingerprint(weights: list[torch.Tensor], samples: int = 64) -> str:
    """Of shapes, dtypes and some values: ranks that are wrongly said to hold the same would not share."""
    found = hashlib.blake2b(digest_size=16)
    for weight in weights:
        values = weight.data.reshape(-1)
        some = values[:: max(len(values) // samples, 1)].cpu().contiguous()
        found.update(f'{weight.dtype} {tuple(weight.shape)} {weight.stride()}'.encode() + some.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _shared_block(everyone: list[Holding], rank: int) -> tuple[torch.Tensor | None, list[Holding]]:
    """The memory that this rank shares with others, if it does, and who shares in the end: all that may, if all of them can open it.

    It is a file without a name, which is not limited as /dev/shm is and is gone with the last process that has it.
    """
    sharers = everyone[rank].sharers(everyone)
    name, file, offer, block, reason = f'gkd_teacher_{secrets.token_hex(8)}', None, None, None, 'one of them cannot open it'
    if len(sharers) > 1 and rank == sharers[0]:
        with contextlib.suppress(OSError, AttributeError):
            file = os.memfd_create(name)
            os.ftruncate(file, max(everyone[rank].bytes, 1))
            offer = f'/proc/{os.getpid()}/fd/{file}', name
    offer = from_all(offer)[sharers[0]]
    if offer is not None:
        try:
            with open(offer[0], 'r+b') as theirs:
                if offer[1] in os.readlink(f'/proc/self/fd/{theirs.fileno()}'):
                    block = _mapped(theirs.fileno(), everyone[rank].bytes)
        except OSError as error:
            reason = str(error)
    opened = from_all(block is not None)
    if file is not None:
        os.close(file)
    agreed = []
    for number, one in enumerate(everyone):
        may = one.sharers(everyone)
        agreed.append(one if len(may) > 1 and all(opened[n] for n in may) else replace(one, key=number))
    if len(sharers) > 1 and not all(opened[n] for n in sharers):
        from swift.utils import get_logger  # where a model visits without ranks, as in benchmarks/gpu, ms-swift need not be installed

        block = None
        size = everyone[rank].bytes / 2**30
        get_logger().warning(
            f'{len(sharers)} ranks of this machine cannot share the teacher in host memory ({reason}), so that each keeps a copy: '
            f'{len(sharers) * size:.2f} GiB instead of {size:.2f}.'
        )
    return block, agreed


def _mapped(file: int, size: int) -> torch.Tensor:
    """Bytes of a file, or for -1 of this process alone; they take memory when they are written."""
    own = {'flags': mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if file < 0 else {}
    return torch.frombuffer(mmap.mmap(file, max(size, 1), **own), dtype=torch.uint8)


def _pin(block: torch.Tensor, purpose: Purpose = TEACHER) -> None:
    if not torch.cuda.is_available():
        return
    error = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel(), 1))
    if error:
        raise OptionError(
            f'{purpose.option}: {block.numel() / 2**30:.2f} GiB of host memory cannot be pinned (cudaHostRegister returns {error}); '
            f'{purpose.instead}.'
        )


def _unpin(block: torch.Tensor) -> None:
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
