"""Fully connected encoders."""

from __future__ import annotations

import math

from gymnasium.spaces import Box
from torch import Tensor

from dmrl_ray.config.components import Sizes
from dmrl_ray.networks.base import Encoder, Memory, join
from dmrl_ray.networks.layers import LayerConfig, dense


class MLP(Encoder):
    """Fully connected layers."""

    class Config(LayerConfig):
        read_with = dict.fromkeys(LayerConfig.model_fields, ("hidden_sizes", ()))

        hidden_sizes: Sizes = (64, 64)
        """Width of each layer."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        width = math.prod(obs_space.shape) + extra
        self.layers = dense(width, config.hidden_sizes, config)
        self.out_dim = config.hidden_sizes[-1] if config.hidden_sizes else width

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        features = self.layers(join(obs.flatten(2), extra).flatten(0, 1))
        return features.unflatten(0, obs.shape[:2]), ()
