"""Action heads: from features to distributions of actions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dmrl_ray.losses.distributions import (
    categorical_entropy,
    categorical_log_prob,
    gaussian_entropy,
    gaussian_log_prob,
)

LOG_STD_BOUNDS = (-3.0, 1.0)
"""Below e^-3 exploration is lost and the gradient explodes; above e^1 all actions clip."""


class CategoricalHead(nn.Module):
    """Discrete actions; distribution parameters are the logits (..., A)."""

    def __init__(self, layer: nn.Module, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layer(features)
        return logits

    def noise(self, rng: np.random.Generator, steps: int, columns: int) -> Tensor:
        """Gumbel noise for `sample`, for a whole rollout at once."""
        shape = (steps, columns, self.num_actions)
        exponential = rng.standard_exponential(shape, dtype=np.float32)
        return torch.from_numpy(-np.log(exponential + np.float32(1e-30)))

    def sample(self, pi: Tensor, noise: Tensor) -> Tensor:
        """Exact samples by the Gumbel-max trick: one addition and one argmax."""
        return (pi + noise).argmax(-1)

    def mode(self, pi: Tensor) -> Tensor:
        """The most probable action."""
        return pi.argmax(-1)

    def log_prob(self, pi: Tensor, action: Tensor) -> Tensor:
        """(...) log-probabilities."""
        return categorical_log_prob(pi, action)

    def entropy(self, pi: Tensor) -> Tensor:
        """(...) in nats."""
        return categorical_entropy(pi)

    def encode(self, action: Tensor) -> Tensor:
        """One-hot; no action (-1) is all zeros."""
        codes = torch.arange(self.num_actions, device=action.device)
        return (action.unsqueeze(-1) == codes).to(torch.float32)


class GaussianHead(nn.Module):
    """Continuous actions in [-1, 1]^A; distribution parameters are (mean, log_std) (..., 2 A).

    The standard deviation does not depend on the observation. Actions outside the box are
    clipped where they meet the environment, not here.
    """

    def __init__(self, layer: nn.Module, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.layer = layer
        self.log_std = nn.Parameter(torch.full((self.num_actions,), -0.5))

    def forward(self, features: Tensor) -> Tensor:
        mean = self.layer(features)
        log_std = self.log_std.clamp(*LOG_STD_BOUNDS)
        return torch.cat([mean, log_std.expand_as(mean)], -1)

    def noise(self, rng: np.random.Generator, steps: int, columns: int) -> Tensor:
        """Standard normal noise for `sample`, for a whole rollout at once."""
        normal = rng.standard_normal((steps, columns, self.num_actions), dtype=np.float32)
        return torch.from_numpy(normal)

    def sample(self, pi: Tensor, noise: Tensor) -> Tensor:
        """mean + std * noise."""
        mean, log_std = pi.chunk(2, -1)
        return mean + log_std.exp() * noise

    def mode(self, pi: Tensor) -> Tensor:
        """The mean."""
        return pi.chunk(2, -1)[0]

    def log_prob(self, pi: Tensor, action: Tensor) -> Tensor:
        """(...) log-densities."""
        mean, log_std = pi.chunk(2, -1)
        return gaussian_log_prob(mean, log_std, action)

    def entropy(self, pi: Tensor) -> Tensor:
        """(...) in nats."""
        return gaussian_entropy(pi.chunk(2, -1)[1])

    def encode(self, action: Tensor) -> Tensor:
        """As the environment felt it."""
        return action.clamp(-1.0, 1.0)
