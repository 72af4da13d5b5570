"""Soft actor-critic over many tasks: off-policy learning from replay.

Source: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv:1812.05905),
algorithm 1; for discrete actions Christodoulou, 2019 (arXiv:1910.07207).

The critics are fully connected, see the whole observation, with the parts that are for critics
only, and stand in `policy.auxiliary`: nobody needs them to act.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.spaces import Discrete
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm, continued
from dmrl_ray.config.components import Number, Sizes
from dmrl_ray.data.replay import Transitions, TrialReplay
from dmrl_ray.losses.soft_actor_critic import (
    categorical_soft_value,
    soft_q_loss,
    soft_q_target,
    soft_value,
    temperature_loss,
)
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.critics import CriticEnsemble, Temperature
from dmrl_ray.networks.heads import SquashedGaussianHead
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Task, Trial

ACTOR = ("encoder.", "policy_head.", "auxiliary.temperature.")
CRITIC = ("auxiliary.critics.", "auxiliary.context_encoder.")


class SoftConfig(Algorithm.Config):
    """Settings of the soft update, shared by every algorithm that uses it."""

    read_with: ClassVar = {"target_entropy": ("temperature", (None,))}

    max_grad_norm: float = Field(default=1_000.0, gt=0)
    """Gradients longer than this are shortened to it."""

    replay_trials: Number = 2_000
    """Columns of the last collections that are kept; the bound of the replay's memory."""

    gradient_steps: Number = 50
    """Steps of critics and policy each, per update."""

    batch_trials: Number = 16
    """Kept columns in each batch."""

    batch_steps: Number = 32
    """Transitions of each of them."""

    gamma: float = Field(default=0.99, ge=0, lt=1)
    """Discount per environment step."""

    tau: float = Field(default=0.005, gt=0, le=1)  # Haarnoja et al. 2018, table 1
    """Share of the way that target critics go towards the critics at each step."""

    reward_scale: float = Field(default=1.0, gt=0)
    """Rewards are multiplied by it."""

    temperature: float | None = Field(default=None, gt=0)
    """What a nat of entropy is worth in scaled reward; null tunes it to `target_entropy`."""

    target_entropy: float | None = None
    """In nats; null is minus the number of continuous actions (Haarnoja et al. 2018, table 1), or
    half the entropy of uniform discrete ones."""

    critic_hidden_sizes: Sizes = (64, 64)
    """Width of each layer of the critics."""


class SAC(Algorithm):
    """One policy for all tasks, which is told nothing of them beside the observation."""

    class Config(SoftConfig):
        num_steps: Number = 32
        """Steps in each column between updates; episodes go on over updates."""

    config: SoftConfig
    continues_episodes = True
    network_unread = ("separate_value", "normalize_value", "squashed")

    def __init__(
        self, config: SoftConfig, distribution: TaskDistribution, policy: ActorCritic
    ) -> None:
        super().__init__(config, distribution, policy)
        if policy.recurrent or policy.is_image:
            raise ValueError(
                "network.encoder: sac and pearl learn from single steps with vectors to see, "
                f"found {'memory' if policy.recurrent else 'images'}; use an mlp"
            )
        actions = policy.policy_head.num_actions
        self.discrete = isinstance(distribution.action_space, Discrete)
        width = math.prod(distribution.observation_space.shape or ()) + policy.latent
        shape = (width, actions) if self.discrete else (width + actions, 1)
        self.critics = CriticEnsemble(*shape, config.critic_hidden_sizes)
        self.targets = self.critics.target()
        self.temperature = Temperature(config.temperature or 1.0)
        policy.value_encoder, policy.value_head, policy.value_norm = None, nn.Identity(), None
        policy.auxiliary.update(
            {"critics": self.critics, "targets": self.targets, "temperature": self.temperature}
        )
        usual = 0.5 * math.log(actions) if self.discrete else -float(actions)
        self.target_entropy = usual if config.target_entropy is None else config.target_entropy
        self.replay = TrialReplay(config.replay_trials)

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        return super().policy_options(config) | {"squashed": True}

    @property
    def collected_steps(self) -> int:
        assert isinstance(self.config, SAC.Config)
        return self.config.num_steps

    def get_state(self) -> Arrays:
        """The replay."""
        return self.replay.get_state()

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self.replay.set_state(state, next(self.policy.parameters()).device)

    def own_adaptation(self) -> Adaptation:
        """Training goes on, by policy gradients."""
        return continued(self, self.config.gamma)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        assert isinstance(self.config, SAC.Config)
        sampler.continue_episodes(tasks, self.policy)
        return [sampler.rollout(self.policy, self.config.num_steps, with_value=False)]

    def update(self, trial: Trial) -> dict[str, float]:
        self.replay.add(trial)
        skipped = self.skipped_batches
        reports = [self._improve() for _ in range(self.config.gradient_steps)]
        if self.skipped_batches == skipped:
            self.policy.update_obs_norm(torch.cat([r.counted(r.obs[:-1]) for r in trial]))
        means = torch.stack([torch.stack(list(report.values())) for report in reports]).mean(0)
        return dict(zip(reports[0], means.tolist(), strict=True))

    def infer(self, slots: np.ndarray, mine: slice) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What policy and critics are told of the tasks in slots, (N, K, L), and what it costs.

        Random numbers are drawn for all slots of a batch, of which N are this learner's.
        """
        return None, {}

    def _improve(self) -> dict[str, Tensor]:
        """A gradient step of the critics, one of the policy, and the targets follow."""
        slots = self.replay.draw(self.rng, self.config.batch_trials)
        shape = (len(slots), self.config.batch_steps)
        at = self.replay.draw_steps(self.rng, slots, shape[1])
        noise = [self.policy.policy_head.noise(self.rng, *shape) for _ in range(2)]
        mine = slice(self.rank, None, self.world_size)
        share = len(slots[mine]) * self.world_size / len(slots)
        steps = self.replay.take(slots[mine], at[mine])
        now, later = (x[mine].to(steps.reward.device) for x in noise)
        latent, costs = self.infer(slots, mine)
        told = None if latent is None else latent.detach()
        reward = self.config.reward_scale * steps.reward
        with torch.no_grad():
            value, _ = self._value(self.targets, steps.next_obs, told, later)
        target = soft_q_target(reward, value, steps.terminated, gamma=self.config.gamma)
        q_loss = soft_q_loss(self._q(steps, latent), target).mean()
        norm = self.step_optimizer(sum(costs.values(), q_loss) * share, CRITIC)
        value, entropy = self._value(self.critics, steps.obs, told, now)
        loss = -value.mean()
        if self.config.temperature is None:
            log = self.temperature.log
            loss = loss + temperature_loss(log, entropy, target=self.target_entropy).mean()
        self.step_optimizer(loss * share, ACTOR)
        self.targets.follow(self.critics, self.config.tau)
        report = {"q_loss": q_loss, "value": value.mean(), "entropy": entropy.mean()} | costs
        report |= {"temperature": self.temperature(), "grad_norm": norm}
        return {name: x.detach() for name, x in report.items()}

    def _q(self, steps: Transitions, latent: Tensor | None) -> Tensor:
        """(2, N, K), what the critics say of the actions that were taken."""
        x, action = self._seen(steps.obs, latent), self.policy.policy_head.encode(steps.action)
        q: Tensor = self.critics(x if self.discrete else torch.cat([x, action], -1))
        return (q * action).sum(-1) if self.discrete else q.squeeze(-1)

    def _value(
        self, critics: CriticEnsemble, obs: Tensor, latent: Tensor | None, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Soft values (N, K) of observations, and the policy's entropies or estimates of them."""
        pi, head = self.policy(obs, latent=latent)[0], self.policy.policy_head
        x, temperature = self._seen(obs, latent), self.temperature().detach()
        if not isinstance(head, SquashedGaussianHead):
            return categorical_soft_value(critics(x), pi, temperature), head.entropy(pi)
        action, log_prob = head.sample_with_log_prob(pi, noise)
        q = critics(torch.cat([x, action], -1)).squeeze(-1)
        return soft_value(q, log_prob, temperature), -log_prob

    def _seen(self, obs: Tensor, latent: Tensor | None) -> Tensor:
        x = self.policy.scale(obs).flatten(2)
        return x if latent is None else torch.cat([x, latent], -1)
