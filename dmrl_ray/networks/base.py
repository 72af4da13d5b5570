"""The contract of an encoder, and what encoders are made of.

Inputs are (T, B, ...); an encoder's memory is a tuple of tensors (B, ...), empty for encoders
without memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, TypeAlias

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from dmrl_ray.config.schema import Component, Settings
from dmrl_ray.networks.linear import Linear

Memory: TypeAlias = tuple[Tensor, ...]
Activation: TypeAlias = Literal[
    "relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "softplus", "tanh", "sigmoid"
]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
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
        """Settings of this encoder in YAML."""

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

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory of one environment, once it has acted."""
        return sum(leaf.nbytes for leaf in self.initial_memory(1))

    def use_plain_operations(self) -> None:
        """From now on, compute by what `torch.func.vmap` and second derivatives can take.

        Raises:
            ValueError: it has memory, and no such operations.
        """
        if self.initial_memory(1):
            raise ValueError(
                f"network.encoder: gradient steps cannot adapt a {type(self).__name__.lower()}; "
                "use an mlp, a cnn, an lstm or a gru"
            )

    @abstractmethod
    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """Features (T, B, out_dim) and the memory after the last step.

        `reset` (T, B) bool zeroes the memory before a step; None means nowhere.
        """


class TorsoEncoder(Encoder):
    """An encoder that may read the observation through another one without memory."""

    class Config(Settings):
        torso: Component | None = None
        """Encoder before the memory, such as a cnn; None feeds the observation."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        self.torso: Encoder | None = None
        self.in_dim = math.prod(obs_space.shape) + extra
        if config.torso is not None:
            torso: Encoder = config.torso.load("encoder")(config.torso.settings, obs_space, extra)
            if torso.initial_memory(1):
                raise ValueError(
                    f"network.encoder.torso: {config.torso.type} has memory of its own"
                )
            self.torso, self.in_dim = torso, torso.out_dim

    def read(self, obs: Tensor, extra: Tensor | None) -> Tensor:
        """(T, B, in_dim) inputs of the memory."""
        if self.torso is None:
            return join(obs.flatten(2), extra)
        return self.torso(obs, extra, (), None)[0]


def select_memory(mask: Tensor, new: Memory, old: Memory) -> Memory:
    """The memory `new` of the environments where `mask` (B,) is true, and `old` of the others."""
    return tuple(
        torch.where(mask.view(-1, *[1] * (b.dim() - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )


def reset_memory(memory: Memory, reset: Tensor) -> Memory:
    """The memory with zeros for the environments where `reset` (B,) is true."""
    return tuple(leaf.masked_fill(reset.view(-1, *[1] * (leaf.dim() - 1)), 0) for leaf in memory)


def join(x: Tensor, extra: Tensor | None) -> Tensor:
    return x if extra is None else torch.cat([x, extra], -1)


def linear(width: int, size: int, *, gain: float) -> nn.Linear:
    """A linear layer: orthogonal weights times `gain`, and a bias of zero."""
    layer = Linear(width, size)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def stack(width: int, sizes: tuple[int, ...], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [linear(width, size, gain=math.sqrt(2)), ACTIVATIONS[activation]()]
        width = size
    return nn.Sequential(*layers)
