"""Encoders: from observations to features.

Inputs are (T, B, ...); an encoder's memory is a tuple of tensors (B, ...), empty for encoders
without memory.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from dmrl_ray.config import Component, Settings

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
        obs_shape: shape of one observation.
        extra: width of the vector (previous action, reward, done) that joins the observation.
    """

    class Config(Settings):
        """What a YAML file may set for this encoder."""

    out_dim: int
    """Width of the features."""

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


def _join(x: Tensor, extra: Tensor | None) -> Tensor:
    return x if extra is None else torch.cat([x, extra], -1)


def linear(width: int, size: int, *, gain: float) -> nn.Linear:
    """A linear layer: orthogonal weights times `gain`, and a bias of zero."""
    layer = nn.Linear(width, size)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _stack(width: int, sizes: tuple[int, ...], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in sizes:
        layers += [linear(width, size, gain=math.sqrt(2)), ACTIVATIONS[activation]()]
        width = size
    return nn.Sequential(*layers)


class MLP(Encoder):
    """Fully connected layers."""

    class Config(Settings):
        sizes: tuple[int, ...] = (64, 64)
        """Width of each layer."""

        activation: Activation = "relu"
        """Between the layers; tanh costs more than a 64-wide layer does on a CPU."""

    def __init__(self, config: Config, obs_shape: tuple[int, ...], extra: int) -> None:
        super().__init__()
        width = math.prod(obs_shape) + extra
        self.layers = _stack(width, config.sizes, config.activation)
        self.out_dim = config.sizes[-1] if config.sizes else width

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        return self.layers(_join(obs.flatten(2), extra)), ()


class CNN(Encoder):
    """Convolutions over images (H, W, C), then fully connected layers."""

    class Config(Settings):
        channels: tuple[int, ...] = (16, 32)
        """Feature maps of each convolution."""

        kernel: int = 3
        """Side of the square kernels, in pixels."""

        stride: int = 1
        """Step of the kernels, in pixels."""

        sizes: tuple[int, ...] = (128,)
        """Width of each layer behind the convolutions."""

        activation: Activation = "relu"
        """Between the layers."""

    def __init__(self, config: Config, obs_shape: tuple[int, ...], extra: int) -> None:
        super().__init__()
        if len(obs_shape) != 3:
            raise ValueError(
                f"network.encoder: a cnn needs image observations (height, width, channels), "
                f"but the tasks' observations have shape {obs_shape}; use an mlp"
            )
        height, width, channels = obs_shape
        layers: list[nn.Module] = []
        for maps in config.channels:
            layers += [
                nn.Conv2d(channels, maps, config.kernel, config.stride, padding=config.kernel // 2),
                ACTIVATIONS[config.activation](),
            ]
            channels = maps
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, obs_shape[2], height, width)).shape[1]
        self.layers = _stack(flat + extra, config.sizes, config.activation)
        self.out_dim = config.sizes[-1] if config.sizes else flat + extra

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        maps = self.convolutions(obs.flatten(0, 1).permute(0, 3, 1, 2))
        return self.layers(_join(maps.unflatten(0, obs.shape[:2]), extra)), ()


class _Recurrent(Encoder):
    """A body, then one recurrent layer; the kernel is fused over steps without a reset."""

    class Config(Settings):
        size: int = 128
        """Width of the memory."""

        body: Component | None = None
        """Encoder before the recurrent layer, such as a cnn; None feeds the observation."""

    kind: type[nn.LSTM] | type[nn.GRU]
    leaves: int

    def __init__(self, config: Config, obs_shape: tuple[int, ...], extra: int) -> None:
        super().__init__()
        self.body: Encoder | None = None
        width = math.prod(obs_shape) + extra
        if config.body is not None:
            self.body = config.body.load()(config.body.settings, obs_shape, extra)
            width = self.body.out_dim
        self.cell = self.kind(width, config.size)
        for name, parameter in self.cell.named_parameters():
            if name.startswith("weight"):
                for gate in parameter.chunk(parameter.shape[0] // config.size):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(parameter)
        self.out_dim = config.size

    def initial_memory(self, num: int) -> Memory:
        return tuple(torch.zeros(num, self.out_dim) for _ in range(self.leaves))

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        if self.body is None:
            x = _join(obs.flatten(2), extra)
        else:
            x, _ = self.body(obs, extra, (), None)
        if reset is None:
            return self._run(x, memory)
        starts = [0, *(reset[1:].any(1).nonzero().flatten() + 1).tolist(), x.shape[0]]
        parts = []
        for start, stop in pairwise(starts):
            keep = (~reset[start]).to(x.dtype).unsqueeze(-1)
            part, memory = self._run(x[start:stop], tuple(leaf * keep for leaf in memory))
            parts.append(part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), memory

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        raise AssertionError


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997)."""

    kind, leaves = nn.LSTM, 2

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, (hidden, cell) = self.cell(x, (memory[0].unsqueeze(0), memory[1].unsqueeze(0)))
        return out, (hidden.squeeze(0), cell.squeeze(0))


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al., 2014)."""

    kind, leaves = nn.GRU, 1

    def _run(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        out, hidden = self.cell(x, memory[0].unsqueeze(0))
        return out, (hidden.squeeze(0),)
