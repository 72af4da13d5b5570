"""Soft actor-critic over many tasks: off-policy learning from replay.

Source: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv:1812.05905),
algorithm 1; for discrete actions Christodoulou, 2019 (arXiv:1910.07207).

Batches are (N, K, ...): K transitions of each of N stored trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm, continued
from dmrl_ray.config.components import Number, Sizes
from dmrl_ray.data.replay import ReplayBuffer, Transitions
from dmrl_ray.learn.descent import Descent
from dmrl_ray.learn.gradients import Report
from dmrl_ray.losses.soft_actor_critic import soft_q_loss, soft_q_target, temperature_loss
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.critics import SoftActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Task, Trial

CRITIC = ("auxiliary.critics.",)
ACTOR = ("encoder.", "policy_head.")
TEMPERATURE = ("auxiliary.temperature.",)
"""Prefixes of the parameters that each of the three losses moves, each by an optimiser of its own:
moments are kept for every parameter, and gradients are clipped by the norm of one loss's."""


class SoftConfig(Algorithm.Config):
    """Settings of the soft update, shared by every algorithm that uses it."""

    read_with: ClassVar = {"target_entropy": ("temperature", (None,))}

    max_grad_norm: float = Field(default=1_000.0, gt=0)
    """Gradients longer than this are shortened to it."""

    replay_trials: Number = 2_000
    """Capacity of the replay in trials, of which each environment adds one per collection."""

    gradient_steps: Number = 50
    """Gradient steps of critics, policy and temperature each, per update."""

    batch_trials: Number = 16
    """Stored trials in each batch."""

    batch_steps: Number = 32
    """Transitions of each of them."""

    gamma: float = Field(default=0.99, ge=0, lt=1)
    """Discount per environment step."""

    tau: float = Field(default=0.005, gt=0, le=1)  # Haarnoja et al. 2018, table 1
    """Target smoothing coefficient: weight of the critics in the targets' moving average."""

    reward_scale: float = Field(default=1.0, gt=0)
    """Rewards are multiplied by it."""

    temperature: float | None = Field(default=None, gt=0)
    """Weight of the entropy beside scaled rewards; null tunes it to `target_entropy`."""

    target_entropy: float | None = None
    """In nats; null is minus the number of continuous actions (Haarnoja et al. 2018, table 1), or,
    as our choice, half the entropy of uniform discrete ones."""

    critic_hidden_sizes: Sizes = (64, 64)
    """Width of each layer of the critics."""


class SAC(Algorithm):
    """One policy for all tasks, without conditioning on the task."""

    class Config(SoftConfig):
        num_steps: Number = 32
        """Steps of each environment between updates; episodes continue over updates."""

    config: Config
    continues_episodes = True
    network_unread = ("separate_value", "normalize_value", "squashed")

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        self.models = soft_actor_critic(config, distribution, policy)
        self.replay = ReplayBuffer(config.replay_trials)

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        return super().policy_options(config) | {"squashed": True}

    @property
    def collected_steps(self) -> int:
        return self.config.num_steps

    def get_state(self) -> Arrays:
        """The replay."""
        return self.replay.get_state()

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self.replay.set_state(state, next(self.policy.parameters()).device)

    def own_adaptation(self) -> Adaptation:
        """Training continues, by policy gradients."""
        return continued(self, self.config.gamma)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Algorithm 1, environment steps: actions of the policy, which the replay will store."""
        sampler.continue_episodes(tasks, self.policy)
        return [sampler.rollout(self.policy, self.config.num_steps, with_value=False)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Algorithm 1, gradient steps, on the replay with what was collected."""
        self.replay.add(trial)
        return gradient_steps(self, trial, self.config.gradient_steps, self.gradient_step)

    def gradient_step(self) -> Report:
        """Algorithm 1, one gradient step: critics, policy, temperature, target critics."""
        config, models = self.config, self.models
        batch = draw_batch(self, self.replay, config)
        loss, report = critic_loss(models, batch, gamma=config.gamma)  # eq. 5
        norm = self.step_optimizer(loss * batch.share, CRITIC)
        loss, of_actor = actor_loss(models, batch)  # eq. 9
        self.step_optimizer(loss * batch.share, ACTOR)
        if config.temperature is None:
            log, target = models.temperature.log, target_entropy(config, models)
            loss = temperature_loss(log, of_actor["entropy"], target=target).mean()  # eq. 18
            self.step_optimizer(loss * batch.share, TEMPERATURE)
        models.targets.polyak_average(models.critics, config.tau)
        return report | of_actor | {"temperature": models.temperature(), "grad_norm": norm}


@dataclass(frozen=True)
class Batch:
    """Transitions of this learner's stored trials, and the noise of the actions in its losses."""

    steps: Transitions  # (N, K, ...), rewards scaled
    noise: Tensor  # (N, K, A), of actions at the observations
    next_noise: Tensor  # (N, K, A), of actions at the next observations
    slots: np.ndarray  # where all learners' trials are in the replay
    mine: slice  # which of them are this learner's
    share: float  # this learner's part of the batch over that of an average learner


def draw_batch(learner: Descent, replay: ReplayBuffer, config: SoftConfig) -> Batch:
    """A batch, of which this learner has its part; random numbers are those of the whole."""
    slots = replay.sample(learner.rng, config.batch_trials)
    at = replay.sample_steps(learner.rng, slots, config.batch_steps)
    head = learner.policy.policy_head
    noise = [head.noise(learner.rng, *at.shape) for _ in range(2)]
    mine = slice(learner.rank, None, learner.world_size)
    share = len(slots[mine]) * learner.world_size / len(slots)
    steps = replay.take(slots[mine], at[mine])
    steps = replace(steps, reward=config.reward_scale * steps.reward)
    now, later = (x[mine].to(steps.reward.device) for x in noise)
    return Batch(steps, now, later, slots, mine, share)


def critic_loss(
    models: SoftActorCritic, batch: Batch, *, gamma: float, latent: Tensor | None = None
) -> tuple[Tensor, Report]:
    """Eq. 5, with the target of eq. 2 and 3; the latent of PEARL is not detached."""
    steps = batch.steps
    with torch.no_grad():
        next_value, _ = models.value(models.targets, steps.next_obs, batch.next_noise, latent)
    target = soft_q_target(steps.reward, next_value, steps.terminated, gamma=gamma)
    loss = soft_q_loss(models.q(steps.obs, steps.action, latent), target).mean()
    return loss, {"q_loss": loss}


def actor_loss(
    models: SoftActorCritic, batch: Batch, *, latent: Tensor | None = None
) -> tuple[Tensor, Report]:
    """Eq. 9: minus the soft value of the policy's own actions, at fixed critics."""
    value, entropy = models.value(models.critics, batch.steps.obs, batch.noise, latent)
    return -value.mean(), {"value": value, "entropy": entropy}


def soft_actor_critic(
    config: SoftConfig, distribution: TaskDistribution, policy: ActorCritic
) -> SoftActorCritic:
    """A policy with its critics.

    Raises:
        ValueError: the policy has memory, or sees images.
    """
    if policy.recurrent or policy.is_image:
        raise ValueError(
            "network.encoder: sac and pearl learn from single steps with vectors to see, "
            f"found {'memory' if policy.recurrent else 'images'}; use an mlp"
        )
    width = math.prod(distribution.observation_space.shape or ())
    return SoftActorCritic(policy, width, config.critic_hidden_sizes, config.temperature or 1.0)


def target_entropy(config: SoftConfig, models: SoftActorCritic) -> float:
    """The entropy that the temperature is tuned to, in nats."""
    if config.target_entropy is not None:
        return config.target_entropy
    actions = models.policy.policy_head.num_actions
    return 0.5 * math.log(actions) if models.discrete else -float(actions)


def gradient_steps(
    learner: Descent, trial: Trial, count: int, step: Callable[[], Report]
) -> dict[str, float]:
    """Take gradient steps, and normalise observations by what was collected from then on.

    Returns:
        Means over all steps of what they report.
    """
    skipped = learner.skipped_batches
    reports = [{name: x.detach().mean() for name, x in step().items()} for _ in range(count)]
    if learner.skipped_batches == skipped:  # else the observations may not be finite either
        learner.policy.update_obs_norm(torch.cat([r.counted(r.obs[:-1]) for r in trial]))
    means = torch.stack([torch.stack(list(report.values())) for report in reports]).mean(0)
    return dict(zip(reports[0], means.tolist(), strict=True))
