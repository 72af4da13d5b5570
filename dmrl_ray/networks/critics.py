"""Critics of soft actor-critic, and with the policy the values that its losses are made of.

Source: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv:1812.05905).
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from dmrl_ray.losses.soft_actor_critic import categorical_soft_value, soft_value
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import linear
from dmrl_ray.networks.heads import SquashedGaussianHead


class CriticEnsemble(nn.Module):
    """K fully connected critics, computed together by one batched product per layer.

    Args:
        width: of the input.
        out: outputs of each critic.
        sizes: width of each hidden layer.
        num_critics: K.
    """

    def __init__(self, width: int, out: int, sizes: tuple[int, ...], num_critics: int = 2) -> None:
        super().__init__()
        self.num_critics, self.num_layers = num_critics, len(sizes) + 1
        for i, size in enumerate((*sizes, out)):
            gain = math.sqrt(2) if i < len(sizes) else 1.0
            weight = torch.empty(num_critics, width, size)
            for own in weight:
                own.copy_(linear(width, size, gain=gain).weight.detach().T)
            self.register_parameter(f"weight{i}", nn.Parameter(weight))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.zeros(num_critics, 1, size)))
            width = size

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (K, ..., out)."""
        y = x.reshape(1, -1, x.shape[-1]).expand(self.num_critics, -1, -1)
        for i in range(self.num_layers):
            y = torch.relu(y) if i else y
            y = torch.baddbmm(getattr(self, f"bias{i}"), y, getattr(self, f"weight{i}"))
        return y.reshape(self.num_critics, *x.shape[:-1], -1)

    def target(self) -> CriticEnsemble:
        """A copy without parameters: its weights are buffers, which no gradient reaches."""
        copy = deepcopy(self)
        for name, parameter in list(copy.named_parameters()):
            delattr(copy, name)
            copy.register_buffer(name, parameter.detach())
        return copy

    @torch.no_grad()
    def polyak_average(self, critics: CriticEnsemble, tau: float) -> None:
        """Move the weights towards those of the critics: ``tau * critics + (1 - tau) * self``."""
        for name, parameter in critics.named_parameters():
            getattr(self, name).lerp_(parameter, tau)


class Temperature(nn.Module):
    """The weight of the entropy in the soft value, alpha in the paper: a positive scalar."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(value)))

    def forward(self) -> Tensor:
        """Scalar."""
        return self.log.exp()


class SoftActorCritic:
    """A policy with the critics, target critics and temperature that soft actor-critic trains.

    The critics are fully connected and see the whole observation, with the parts that are for
    critics only. They stand in `policy.auxiliary`, as acting does not need them.

    Args:
        policy: loses its value function.
        observation_width: D, of a flat observation.
        hidden_sizes: of the critics.
        temperature: at the beginning.
    """

    def __init__(
        self,
        policy: ActorCritic,
        observation_width: int,
        hidden_sizes: tuple[int, ...],
        temperature: float,
    ) -> None:
        self.policy = policy
        self.discrete = not isinstance(policy.policy_head, SquashedGaussianHead)
        width, actions = observation_width + policy.latent, policy.policy_head.num_actions
        shape = (width, actions) if self.discrete else (width + actions, 1)
        self.critics = CriticEnsemble(*shape, hidden_sizes)
        self.targets = self.critics.target()
        self.temperature = Temperature(temperature)
        policy.value_encoder, policy.value_head, policy.value_norm = None, nn.Identity(), None
        policy.auxiliary.update(
            {"critics": self.critics, "targets": self.targets, "temperature": self.temperature}
        )

    def q(self, obs: Tensor, action: Tensor, latent: Tensor | None = None) -> Tensor:
        """(2, N, K), Q(s, a) of both critics.

        Args:
            obs: (N, K, *obs_shape).
            action: (N, K, *action_shape), as the environment takes it.
            latent: (N, K, L), where the policy is conditioned on one.
        """
        x, action = self._critic_input(obs, latent), self.policy.policy_head.encode(action)
        q: Tensor = self.critics(x if self.discrete else torch.cat([x, action], -1))
        return (q * action).sum(-1) if self.discrete else q.squeeze(-1)

    def value(
        self, critics: CriticEnsemble, obs: Tensor, noise: Tensor, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Soft values (N, K), eq. 3, and the policy's entropies or estimates of them, in nats.

        The expectation over actions is exact where they are discrete, and a sample elsewhere.

        Args:
            critics: whose smallest Q counts.
            obs: (N, K, *obs_shape).
            noise: (N, K, A), by which continuous actions are sampled (eq. 8).
            latent: (N, K, L), where the policy is conditioned on one.
        """
        pi, head = self.policy(obs, latent=latent)[0], self.policy.policy_head
        x, temperature = self._critic_input(obs, latent), self.temperature().detach()
        if not isinstance(head, SquashedGaussianHead):
            return categorical_soft_value(critics(x), pi, temperature), head.entropy(pi)
        action, log_prob = head.sample_with_log_prob(pi, noise)
        q = critics(torch.cat([x, action], -1)).squeeze(-1)
        return soft_value(q, log_prob, temperature), -log_prob

    def _critic_input(self, obs: Tensor, latent: Tensor | None) -> Tensor:
        x = self.policy.scale(obs).flatten(2)
        return x if latent is None else torch.cat([x, latent], -1)
