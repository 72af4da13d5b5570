"""A belief about the task: the posterior over its latent given the trial so far.

Source: Zintgraf et al., "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL via
Meta-Learning", 2020, section 3 (arXiv:1910.08348).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from gymnasium.spaces import Box
from torch import Tensor

from dmrl_ray.config.schema import Component, Settings, Size, Sizes
from dmrl_ray.networks.base import Activation, Encoder, Memory, linear, stack


class Belief(Encoder):
    """A diagonal Gaussian over a latent task; features are a function of it and the observation."""

    class Config(Settings):
        read_with: ClassVar = {"activation": ("hidden_sizes", ())}

        latent: Size = 5
        """Dimensions of the latent task."""

        history: Component = Component.model_validate({"type": "gru", "hidden_size": 64})
        """Encoder with memory, of whose features the belief is a linear function."""

        hidden_sizes: Sizes = (64,)
        """Width of each layer between belief with observation and the heads."""

        activation: Activation = "relu"
        """Between those layers."""

        detach: bool = True
        """Stop gradients of the policy's loss at the belief; false lets them pass, as in RL^2."""

    def __init__(self, config: Config, obs_space: Box, extra: int) -> None:
        super().__init__()
        self.history: Encoder = config.history.load("encoder")(
            config.history.settings, obs_space, extra
        )
        if not self.history.initial_memory(1):
            raise ValueError(
                f"network.encoder.history: {config.history.type} has no memory; use gru or lstm"
            )
        self.gaussian = linear(self.history.out_dim, 2 * config.latent, gain=1.0)
        width = math.prod(obs_space.shape) + 2 * config.latent
        self.layers = stack(width, config.hidden_sizes, config.activation)
        self.latent, self.detach = config.latent, config.detach
        self.out_dim = config.hidden_sizes[-1] if config.hidden_sizes else width

    def initial_memory(self, num: int) -> Memory:
        return self.history.initial_memory(num)

    def posterior(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Mean and log-variance (T, B, L) of the belief at each step, and the memory."""
        x, memory = self.history(obs, extra, memory, reset)
        mean, log_var = self.gaussian(x).chunk(2, -1)
        return mean, log_var, memory

    def features(self, obs: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        """(T, B, out_dim), the features of an observation and a belief."""
        x: Tensor = self.layers(torch.cat([obs.flatten(2), mean, log_var], -1))
        return x

    def forward(
        self, obs: Tensor, extra: Tensor | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Memory]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            mean, log_var, memory = self.posterior(obs, extra, memory, reset)
        return self.features(obs, mean, log_var), memory
