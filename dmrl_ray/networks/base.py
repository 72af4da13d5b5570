"""The contract of an encoder, and what encoders are made of.

Inputs are (T, B, ...); an encoder's memory is a tuple of tensors (B, ...), empty for encoders
without memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from dmrl_ray.config import Settings

Memory: TypeAlias = tuple[Tensor, ...]
Activation: TypeAlias = Literal["relu", "tanh", "silu", "gelu", "elu", "softplus", "sigmoid"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
}


class Encoder(nn.Module):
    """Turns observations into features; the class to extend for another network.

    Args:
        config: the encoder's own `Config`.
        obs_space: of one observation; a `Packed` one has named parts.
        extra: width of the vector (previous action, reward, done) that joins the observation.
    """

    class Config(Settings):
        """What a YAML file may set for this encoder."""

    out_dim: int
    """Width of the features."""

    def action_layer(self, size: int) -> nn.Module:
        """The layer from features to the parameters of a distribution of actions.

        Encoders that keep apart what belongs to each action bring their own.
        """
        return linear(self.out_dim, size, gain=0.01)

    def initial_memory(self, num: int) -> Memory:
        """The memory before the first step of a trial."""
        return ()

    @abstractmethod
    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """Features (T, B, out_dim) and the memory after the last step.

        `reset` (T, B) bool zeroes the memory before a step; None means nowhere.
        """


def join(x: Tensor, extra: Tensor | None) -> Tensor:
    return x if extra is None else torch.cat([x, extra], -1)


def linear(width: int, size: int, *, gain: float) -> nn.Linear:
    """A linear layer: orthogonal weights times `gain`, and a bias of zero."""
    layer = nn.Linear(width, size)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def stack(width: int, sizes: tuple[int, ...], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [linear(width, size, gain=math.sqrt(2)), ACTIVATIONS[activation]()]
        width = size
    return nn.Sequential(*layers)
