"""The generators that a training step draws from, as they are now."""

from __future__ import annotations

import torch


class RandomState:
    """The CPU's generator and that of a GPU.

    Args:
        device: The GPU, or another device.
    """

    def __init__(self, device: torch.device):
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == 'cuda' else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
