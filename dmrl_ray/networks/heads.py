"""Action heads: from features to distributions of actions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from dmrl_ray.backend import Stream, namespace
from dmrl_ray.losses.distributions import (
    categorical_entropy,
    categorical_kl,
    categorical_log_prob,
    categorical_log_prob_and_entropy,
    gaussian_entropy,
    gaussian_log_prob,
    squashed_gaussian_log_prob,
)
from dmrl_ray.losses.latent import gaussian_kl

LOG_STD_BOUNDS = (-3.0, 1.0)
"""Below e^-3 exploration is lost and the gradient explodes; above e^1 all actions clip."""

SQUASHED_LOG_STD_BOUNDS = (-5.0, 2.0)
"""Before tanh, where e^2 is all but uniform over the signs of the action."""


class CategoricalHead(nn.Module):
    """Discrete actions; distribution parameters are the logits (..., A)."""

    def __init__(self, layer: nn.Module, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layer(features)
        return logits

    def noise(self, rng: Stream, num_steps: int, num_envs: int) -> Tensor:
        """Gumbel noise for `sample`, for a whole rollout at once."""
        shape = (num_steps, num_envs, self.num_actions)
        exponential = rng.standard_exponential(shape, dtype=np.float32)
        log = namespace(exponential).log
        return torch.as_tensor(-log(exponential + 1e-30))

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

    def log_prob_and_entropy(self, pi: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once."""
        return categorical_log_prob_and_entropy(pi, action)

    def kl(self, pi: Tensor, other: Tensor) -> Tensor:
        """(...) in nats, of `pi` from `other`."""
        return categorical_kl(pi, other)

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

    def noise(self, rng: Stream, num_steps: int, num_envs: int) -> Tensor:
        """Standard normal noise for `sample`, for a whole rollout at once."""
        normal = rng.standard_normal((num_steps, num_envs, self.num_actions), dtype=np.float32)
        return torch.as_tensor(normal)

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

    def log_prob_and_entropy(self, pi: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once."""
        return self.log_prob(pi, action), self.entropy(pi)

    def kl(self, pi: Tensor, other: Tensor) -> Tensor:
        """(...) in nats, of `pi` from `other`."""
        (mean, log_std), (other_mean, other_log_std) = pi.chunk(2, -1), other.chunk(2, -1)
        return gaussian_kl(mean, 2 * log_std, other_mean, 2 * other_log_std)

    def encode(self, action: Tensor) -> Tensor:
        """As the environment felt it."""
        return action.clamp(-1.0, 1.0)


class SquashedGaussianHead(nn.Module):
    """Continuous actions in (-1, 1)^A; distribution parameters are (mean, log_std) (..., 2 A).

    Both depend on the observation and stand before tanh, which takes samples into the box.

    Args:
        layer: from features to 2 A numbers.
        num_actions: A.
    """

    def __init__(self, layer: nn.Module, num_actions: int) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.layer = layer

    def forward(self, features: Tensor) -> Tensor:
        mean, log_std = self.layer(features).chunk(2, -1)
        return torch.cat([mean, log_std.clamp(*SQUASHED_LOG_STD_BOUNDS)], -1)

    def noise(self, rng: Stream, num_steps: int, num_envs: int) -> Tensor:
        """Standard normal noise for `sample`, for a whole rollout at once."""
        normal = rng.standard_normal((num_steps, num_envs, self.num_actions), dtype=np.float32)
        return torch.as_tensor(normal)

    def sample(self, pi: Tensor, noise: Tensor) -> Tensor:
        """tanh(mean + std * noise)."""
        return self.sample_with_log_prob(pi, noise)[0]

    def sample_with_log_prob(self, pi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Samples through which gradients reach pi, and their log-densities (...)."""
        mean, log_std = pi.chunk(2, -1)
        unsquashed = mean + log_std.exp() * noise
        return unsquashed.tanh(), squashed_gaussian_log_prob(mean, log_std, unsquashed)

    def mode(self, pi: Tensor) -> Tensor:
        """The median, tanh(mean)."""
        return pi.chunk(2, -1)[0].tanh()

    def log_prob(self, pi: Tensor, action: Tensor) -> Tensor:
        """(...) log-densities; of actions that rounding has put on the border, just within it."""
        mean, log_std = pi.chunk(2, -1)
        return squashed_gaussian_log_prob(mean, log_std, action.clamp(-1 + 1e-6, 1 - 1e-6).atanh())

    def entropy(self, pi: Tensor) -> Tensor:
        """(...) in nats, by Gauss-Hermite quadrature: there is no closed form."""
        mean, log_std = pi.chunk(2, -1)
        nodes, weights = (
            torch.as_tensor(x, dtype=pi.dtype, device=pi.device)
            for x in np.polynomial.hermite_e.hermegauss(16)
        )
        at = (mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * nodes).unsqueeze(-1)
        each = squashed_gaussian_log_prob(mean[..., None, None], log_std[..., None, None], at)
        return -(each * weights).sum((-1, -2)) / math.sqrt(2 * math.pi)

    def log_prob_and_entropy(self, pi: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both at once."""
        return self.log_prob(pi, action), self.entropy(pi)

    def kl(self, pi: Tensor, other: Tensor) -> Tensor:
        """(...) in nats, of `pi` from `other`; tanh does not change it."""
        (mean, log_std), (other_mean, other_log_std) = pi.chunk(2, -1), other.chunk(2, -1)
        return gaussian_kl(mean, 2 * log_std, other_mean, 2 * other_log_std)

    def encode(self, action: Tensor) -> Tensor:
        """As it is."""
        return action


def exactly(head: nn.Module, features: Tensor) -> Tensor:
    """A head's answer in full precision, whatever the layers below it were computed in.

    Ratios of probabilities and small differences of values are lost in eight bits.
    """
    answer: Tensor
    if features.dtype == torch.bfloat16:
        with torch.autocast(features.device.type, enabled=False):
            answer = head(features.float())
    else:
        answer = head(features)
    return answer
