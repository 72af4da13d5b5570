"""Convolutional encoders."""

from __future__ import annotations

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from dmrl_ray.config import Settings
from dmrl_ray.networks.base import ACTIVATIONS, Activation, Encoder, Memory, join, stack


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

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        obs_shape = obs_space.shape
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
        self.layers = stack(flat + extra, config.sizes, config.activation)
        self.out_dim = config.sizes[-1] if config.sizes else flat + extra

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        maps = self.convolutions(obs.flatten(0, 1).permute(0, 3, 1, 2))
        return self.layers(join(maps.unflatten(0, obs.shape[:2]), extra)), ()
