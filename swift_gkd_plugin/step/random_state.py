"""The generators that a training step draws from, as they are now."""

from __future__ import annotations

import torch


def random_numbers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The state of the CPU's generator and of a GPU's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == 'cuda' else None


def restore_numbers(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
