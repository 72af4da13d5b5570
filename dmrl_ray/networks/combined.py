"""An encoder of observations with named parts, each read by an encoder of its own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config.components import did_you_mean
from dmrl_ray.config.schema import Component, Settings
from dmrl_ray.networks.base import Encoder, Memory, join
from dmrl_ray.tasks.spaces import Packed


class Combined(Encoder):
    """One encoder for each part of an observation; their features side by side, then a trunk."""

    class Config(Settings):
        parts: dict[str, Component] = Field(default_factory=dict)
        """Encoders by the name of the part; by default a cnn for an image, an embedding for
        tokens and integers, an mlp for other numbers."""

        trunk: Component | None = None
        """Encoder of all features together, such as an mlp or gru; None passes them on."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        if not isinstance(obs_space, Packed):
            raise ValueError(
                "network.encoder: combined needs observations with named parts, but the tasks' "
                f"observations are one array of shape {obs_space.shape}; use an mlp or a cnn"
            )
        for name in config.parts.keys() - obs_space.parts.keys():
            raise ValueError(
                f"network.encoder.parts.{name}: observations have the parts "
                f"{', '.join(obs_space.parts)}{did_you_mean(name, obs_space.parts)}"
            )
        self.space = obs_space
        encoders = {
            name: _encoder(config.parts.get(name) or _default(part), name, part)
            for name, part in obs_space.parts.items()
        }
        # Names of parts may have dots, which names of modules may not.
        self.parts = nn.ModuleList(encoders.values())
        self.out_dim = sum(encoder.out_dim for encoder in encoders.values()) + extra
        self.trunk: Encoder | None = None
        if config.trunk is not None:
            joined = Box(-torch.inf, torch.inf, (self.out_dim - extra,))
            self.trunk = config.trunk.load("encoder")(config.trunk.settings, joined, extra)
            self.out_dim = self.trunk.out_dim

    def initial_memory(self, num: int) -> Memory:
        return () if self.trunk is None else self.trunk.initial_memory(num)

    def action_layer(self, size: int) -> nn.Module:
        return super().action_layer(size) if self.trunk is None else self.trunk.action_layer(size)

    def use_plain_operations(self) -> None:
        for encoder in (*self.parts, *([self.trunk] if self.trunk else [])):
            assert isinstance(encoder, Encoder)
            encoder.use_plain_operations()

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        features = [
            encoder(self.space.part(obs, name), None, (), None)[0]
            for name, encoder in zip(self.space.parts, self.parts, strict=True)
        ]
        joined = torch.cat(features, -1)
        if self.trunk is None:
            return join(joined, extra), memory
        return self.trunk(joined, extra, memory, reset)


def _default(part: gym.Space[Any]) -> Component:
    if isinstance(part, Discrete | MultiDiscrete):
        return Component(type="embedding")
    if len(part.shape or ()) == 3:
        return Component(type="cnn")
    return Component.model_validate({"type": "mlp", "hidden_sizes": [64]})


def _encoder(component: Component, name: str, part: gym.Space[Any]) -> Encoder:
    space = Box(0.0, 1.0, (int(part.n),)) if isinstance(part, Discrete) else part
    encoder: Encoder = component.load("encoder")(component.settings, space, 0)
    if encoder.initial_memory(1):
        raise ValueError(
            f"network.encoder.parts.{name}: {component.type} has memory; give it to the trunk"
        )
    return encoder
