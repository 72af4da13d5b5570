"""PEARL: soft actor-critic that is told a guess of the task, drawn from a belief about it.

Source: Rakelly et al., "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context
Variables", 2019 (arXiv:1903.08254), algorithms 1 and 2.

Every transition that was seen of a task is a Gaussian factor; their product with the standard
normal prior is the belief, whatever their order. The encoder learns from the critics' loss alone.
Critics learn from whole trials, beliefs from the beginnings of trials, which is what a policy knows
when it needs them. Not in the paper: with `belief_steps` the belief is renewed within episodes,
not at their ends alone; with `kept_noise` exploration goes farther.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from dmrl_ray.algorithms.adaptation import Adaptation, Agent
from dmrl_ray.algorithms.sac import SAC, SoftConfig
from dmrl_ray.config.components import Number, Size, Sizes
from dmrl_ray.data.replay import draw_below
from dmrl_ray.losses.latent import gaussian_kl, gaussian_sample, product_of_gaussians
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory, linear, stack
from dmrl_ray.networks.heads import CategoricalHead
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


@dataclass(frozen=True)
class Posterior:
    """Beliefs about the tasks of B environments, as sums of Gaussian factors, and their noise.

    An environment's belief is the product of the standard normal prior with its factors.
    """

    precision: Tensor  # (B, L)
    weighted_mean: Tensor  # (B, L)
    noise: Tensor | None = None  # (B, L), by which the latent of an episode is drawn
    drift: Tensor | None = None  # (B, A), the part of actions' noise that stays for an episode
    kept: float = 0.0  # its weight


class PEARL(SAC):
    """Soft actor-critic given a latent task."""

    class Config(SoftConfig):
        latent: Size = 5
        """Dimensions of the latent task."""

        context_hidden_sizes: Sizes = (64, 64)
        """Width of each layer between a transition and its factor."""

        context_episodes: Number = 1
        """Episodes at the start of a trial that contexts to learn from are taken from."""

        belief_steps: Number | None = None
        """Steps between renewals of the belief; null is an episode. The noise by which a latent is
        drawn from it stays the same for an episode."""

        kept_noise: float = Field(default=0.0, ge=0, lt=1)
        """Weight of a part of the noise of continuous actions that stays for an episode, while
        collecting; its square is the correlation between steps. Such noise leads farther away
        than noise that is drawn anew at every step (Eberhard et al., "Pink noise is all you
        need", 2023); tasks that no belief leads to are met by it alone."""

        kl_weight: float = Field(default=0.1, ge=0)  # Rakelly et al. 2019; 1 for sparse rewards
        """Price of each nat by which a belief differs from the prior."""

    config: Config
    continues_episodes = False

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        if config.context_episodes > distribution.episodes_per_trial:
            raise ValueError(
                f"algorithm.context_episodes: {config.context_episodes}, but trials of the family "
                f"have {distribution.episodes_per_trial} episodes"
            )
        if config.kept_noise and isinstance(policy.policy_head, CategoricalHead):
            raise ValueError("algorithm.kept_noise: discrete actions have no noise to keep; use 0")
        width = math.prod(distribution.observation_space.shape or ())
        sizes = (width + policy.policy_head.num_actions + 1, *config.context_hidden_sizes)
        self.context_encoder = nn.Sequential(
            *stack(sizes[0], sizes[1:], "relu"), linear(sizes[-1], 2 * config.latent, gain=1.0)
        )
        policy.auxiliary["context_encoder"] = self.context_encoder

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        return super().policy_options(config) | {"latent": config.latent}

    @property
    def collected_steps(self) -> int:
        return self.distribution.trial_steps

    def own_adaptation(self) -> Adaptation:
        return self

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        agent = self.begin(sampler, tasks)
        agent.state = replace(agent.state, kept=self.config.kept_noise)
        return list(self.play(sampler, agent, self.distribution.episodes_per_trial))

    def initial_state(self, sampler: Sampler, num_tasks: int) -> Posterior:
        nothing = torch.zeros(sampler.num_envs, self.config.latent)
        return Posterior(nothing, nothing)

    def rounds(self, episodes: int) -> list[int]:
        return [1] * episodes

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        """With a latent drawn from the belief, by noise that is kept for an episode."""
        posterior: Posterior = agent.state
        if sampler.fresh:
            posterior = agent.state = self._with_noise(sampler, posterior)
        assert posterior.noise is not None
        assert posterior.drift is not None
        factors = (posterior.precision, posterior.weighted_mean)
        mean, log_var = product_of_gaussians(*(x.unsqueeze(1) for x in factors))
        latent = gaussian_sample(mean, log_var, posterior.noise).unsqueeze(0)
        return sampler.rollout(
            self.policy,
            self.config.belief_steps,
            actor=partial(self._act, latent, posterior.kept, posterior.drift),
            adaptation_step=agent.adaptation_step,
            with_value=False,
        )

    @torch.no_grad()
    def adapt(self, state: Posterior, experience: Rollout) -> Posterior:
        """Every transition is a Gaussian factor of the belief (eq. 2)."""
        seen = (experience.obs[:-1], experience.action, experience.reward)
        factors: tuple[Tensor, ...] = self.factors(*seen)
        if not experience.all_count:
            factors = tuple(factor * experience.mask.unsqueeze(-1) for factor in factors)
        precision, weighted_mean = (factor.sum(0) for factor in factors)
        return replace(
            state,
            precision=state.precision + precision,
            weighted_mean=state.weighted_mean + weighted_mean,
        )

    def _with_noise(self, sampler: Sampler, posterior: Posterior) -> Posterior:
        """Noise of an episode: of its latent, and the part of its actions' that stays."""
        actions = self.policy.policy_head.num_actions
        noise = sampler.rng.standard_normal(tuple(posterior.precision.shape), dtype=np.float32)
        drift = np.zeros((sampler.num_envs, actions), np.float32)
        if posterior.kept:
            drift = sampler.rng.standard_normal(drift.shape, dtype=np.float32)
        return replace(posterior, noise=torch.from_numpy(noise), drift=torch.from_numpy(drift))

    def factors(self, obs: Tensor, action: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and precision-weighted mean (T, B, L) of what each transition says."""
        parts = (self.policy.scale(obs).flatten(2), self.policy.policy_head.encode(action))
        x = torch.cat([*parts, reward.unsqueeze(-1)], -1)
        mean, raw = self.context_encoder(x).chunk(2, -1)
        # Weak at first: many factors that know nothing yet shall not make a belief sharp.
        precision = softplus(raw - 3.0)
        return precision, precision * mean

    def infer(self, slots: np.ndarray, mine: slice) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Latents drawn from what the first steps of trials show, however many are known.

        That number is drawn for each transition of a batch, not for each trial: as many beliefs to
        learn from as transitions, for the same number of factors.
        """
        lengths = self.replay.lengths(slots, self.config.context_episodes)
        shape = (len(slots), self.config.batch_steps)
        known = draw_below(self.rng, lengths + 1, shape[1])[mine]
        noise = self.rng.standard_normal((*shape, self.config.latent), dtype=np.float32)[mine]
        context = self.replay.take(slots[mine], slice(int(lengths.max())))
        factors = self.factors(context.obs, context.action, context.reward)
        row = np.arange(len(known))[:, None]
        beliefs = [pad(x.cumsum(1), (0, 0, 1, 0))[row, known] for x in factors]  # (N, K, L)
        mean, log_var = product_of_gaussians(*(x.unsqueeze(-2) for x in beliefs))
        prior = torch.zeros_like(mean)
        kl = gaussian_kl(mean, log_var, prior, prior).mean()
        latent = gaussian_sample(mean, log_var, torch.from_numpy(noise).to(mean.device))
        return latent, {"kl_cost": self.config.kl_weight * kl}

    def _act(
        self,
        latent: Tensor,
        kept: float,
        drift: Tensor,
        obs: Tensor,
        previous: Previous | None,
        memory: Memory,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """The actor on a given task, whose noise is in part the drift of its column (B, A).

        The belief is not the encoder's memory, and stays.
        """
        pi, features, _ = self.policy(obs, latent=latent)
        if kept:
            mean, log_std = pi.chunk(2, -1)
            mean = mean + kept * log_std.exp() * drift
            pi = torch.cat([mean, log_std + 0.5 * math.log(1 - kept * kept)], -1)
        return pi, features, memory
