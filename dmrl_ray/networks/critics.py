"""Critics side by side, so that the least of several estimates can be taken."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from dmrl_ray.networks.base import linear


class CriticEnsemble(nn.Module):
    """K fully connected critics; all of them cost one batched product per layer.

    Args:
        width: of the input.
        out: numbers that each critic gives.
        sizes: width of each hidden layer.
        num_critics: K.
    """

    def __init__(self, width: int, out: int, sizes: tuple[int, ...], num_critics: int = 2) -> None:
        super().__init__()
        self.num_critics, self.num_layers = num_critics, len(sizes) + 1
        for i, size in enumerate((*sizes, out)):
            gain = math.sqrt(2) if i < len(sizes) else 1.0
            weight = torch.empty(num_critics, width, size)
            for own in weight:
                own.copy_(linear(width, size, gain=gain).weight.detach().T)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.zeros(num_critics, 1, size)))
            width = size

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (K, ..., out)."""
        y = x.reshape(1, -1, x.shape[-1]).expand(self.num_critics, -1, -1)
        for i in range(self.num_layers):
            y = torch.relu(y) if i else y
            y = torch.baddbmm(getattr(self, f"bias{i}"), y, getattr(self, f"weight{i}"))
        return y.reshape(self.num_critics, *x.shape[:-1], -1)

    def target(self) -> CriticEnsemble:
        """A copy that no gradient moves: its weights are buffers."""
        copy = deepcopy(self)
        for name, parameter in list(copy.named_parameters()):
            delattr(copy, name)
            copy.register_buffer(name, parameter.detach())
        return copy

    @torch.no_grad()
    def follow(self, critics: CriticEnsemble, share: float) -> None:
        """Go this share of the way to another ensemble's weights."""
        for name, parameter in critics.named_parameters():
            getattr(self, name).lerp_(parameter, share)


class Temperature(nn.Module):
    """The reward of a nat of entropy: a positive scalar."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(value)))

    def forward(self) -> Tensor:
        """Scalar."""
        return self.log.exp()
