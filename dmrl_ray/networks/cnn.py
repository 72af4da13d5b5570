"""Convolutional encoders."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from gymnasium.spaces import Box
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from dmrl_ray.config.components import LARGEST_SIZE, Size, Sizes
from dmrl_ray.networks.base import ACTIVATIONS, Encoder, Memory, join
from dmrl_ray.networks.layers import LayerConfig, dense, map_norms

POOLS: dict[str, type[nn.MaxPool2d] | type[nn.AvgPool2d]] = {
    "max": nn.MaxPool2d,
    "average": nn.AvgPool2d,
}


_EACH = Discriminator(lambda value: "each" if isinstance(value, list | tuple) else "one")
OneOrEach: TypeAlias = Annotated[
    Annotated[Size, Tag("one")] | Annotated[Sizes, Tag("each")], _EACH  # one message, not two
]


class ImageEncoder(Encoder):
    """Convolutions over images (H, W, C), then fully connected layers."""

    class Config(LayerConfig):
        read_with = dict.fromkeys(("dropout", "adapters"), ("hidden_sizes", ()))

        hidden_sizes: Sizes = (128,)
        """Width of each layer behind the convolutions."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        obs_shape = obs_space.shape
        if len(obs_shape) != 3:
            raise ValueError(
                f"network.encoder: a {type(self).__name__.lower()} needs image observations "
                f"(height, width, channels), but the tasks' observations have shape {obs_shape}; "
                "use an mlp"
            )
        height, width, channels = obs_shape
        self.convolutions = self.build(config, channels).append(nn.Flatten())
        with torch.no_grad():
            blank = torch.zeros(1, channels, height, width)
            flat = self.convolutions.eval()(blank).shape[1]
        self.convolutions.train()
        self.layers = dense(flat + extra, config.hidden_sizes, config)
        self.out_dim = config.hidden_sizes[-1] if config.hidden_sizes else flat + extra

    @abstractmethod
    def build(self, config: Config, channels: int) -> nn.Sequential:
        """The convolutions, (N, C, H, W) to (N, C', H', W')."""

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        maps = self.convolutions(obs.flatten(0, 1).permute(0, 3, 1, 2))
        features = self.layers(join(maps, None if extra is None else extra.flatten(0, 1)))
        return features.unflatten(0, obs.shape[:2]), ()


class CNN(ImageEncoder):
    """A chain of convolutions, each with a pooling if wanted."""

    class Config(ImageEncoder.Config):
        read_with: ClassVar = {"pool_size": ("pool", ("max", "average"))}

        channels: Sizes = (16, 32)
        """Feature maps of each convolution."""

        kernel: OneOrEach = 3
        """Side of the square kernels, in pixels; one for all, or one for each convolution."""

        stride: OneOrEach = 1
        """Step of the kernels, in pixels; one for all, or one for each convolution."""

        pool: Literal["none", "max", "average"] = "none"
        """The value that is kept of each square of `pool_size` pixels behind a convolution."""

        pool_size: Size = 2
        """Side of those squares."""

    def build(self, config: ImageEncoder.Config, channels: int) -> nn.Sequential:
        assert isinstance(config, CNN.Config)
        count = len(config.channels)
        kernels = _each("kernel", config.kernel, count)
        strides = _each("stride", config.stride, count)
        layers = nn.Sequential()
        for i, (maps, kernel, stride) in enumerate(
            zip(config.channels, kernels, strides, strict=True)
        ):
            convolution = nn.Conv2d(channels, maps, kernel, stride, padding=kernel // 2)
            layers.add_module(f"{2 * i}", convolution)
            for name, norm in map_norms(maps, config).items():
                layers.add_module(f"{name}{i}", norm)
            layers.add_module(f"{2 * i + 1}", ACTIVATIONS[config.activation]())
            if config.pool != "none":
                pool = POOLS[config.pool](config.pool_size, ceil_mode=True)
                layers.add_module(f"pool{i}", pool)
            channels = maps
        return layers


def _each(setting: str, value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    if len(value) != count:
        raise ValueError(
            f"network.encoder.{setting}: {len(value)} values for {count} convolutions; "
            "give one for each, or one number for all"
        )
    return value


class Residual(ImageEncoder):
    """Convolutions that are added to what they read, between poolings.

    Source: Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
    Actor-Learner Architectures", 2018, figure 3, right (arXiv:1802.01561).
    """

    class Config(ImageEncoder.Config):
        hidden_sizes: Sizes = (256,)
        """Width of each layer behind the convolutions."""

        channels: Sizes = (16, 32, 32)
        """Feature maps of each section; each halves height and width."""

        blocks: int = Field(default=2, ge=0, le=LARGEST_SIZE)
        """Residual blocks of each section."""

        pool: Literal["max", "average"] = "max"
        """How a section halves the image."""

    def build(self, config: ImageEncoder.Config, channels: int) -> nn.Sequential:
        assert isinstance(config, Residual.Config)
        layers: list[nn.Module] = []
        for maps in config.channels:
            layers.append(nn.Conv2d(channels, maps, 3, padding=1))
            layers.append(POOLS[config.pool](3, stride=2, padding=1))
            layers += [_ResidualBlock(maps, config) for _ in range(config.blocks)]
            channels = maps
        return nn.Sequential(*layers, ACTIVATIONS[config.activation]())


class _ResidualBlock(nn.Module):
    """Twice norms, activation and convolution; added to the input."""

    def __init__(self, maps: int, config: LayerConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for i in range(2):
            for name, norm in map_norms(maps, config).items():
                self.layers.add_module(f"{name}{i}", norm)
            self.layers.add_module(f"{2 * i}", ACTIVATIONS[config.activation]())
            self.layers.add_module(f"{2 * i + 1}", nn.Conv2d(maps, maps, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.layers(x)
        return x + added
