"""VariBAD: a policy that acts on a learned belief about the task.

Source: Zintgraf et al., "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL via
Meta-Learning", 2020 (arXiv:1910.08348), section 3. PPO on whole trials moves the policy, which
sees the observation and the belief's mean and log-variance; a variational bound on what the whole
trial shows, its past and its future, moves the belief. Left out: Huber and clipped value losses,
and running statistics of the belief.

Without updates of the belief and with an encoder that does not detach it, this is RL^2.
"""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.actor_critic import updating_norms
from dmrl_ray.algorithms.ppo import ppo_batch, ppo_loss
from dmrl_ray.algorithms.rl2 import RL2
from dmrl_ray.config.components import LARGEST_NUMBER, Number
from dmrl_ray.data.replay import Transitions, TrialReplay
from dmrl_ray.learn.gradients import Batch
from dmrl_ray.learn.minibatches import pi_and_value, single_steps
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.latent import chained_kl, gaussian_sample
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, mask_previous, previous_inputs
from dmrl_ray.networks.belief import Belief
from dmrl_ray.networks.decoder import TrialDecoder
from dmrl_ray.networks.heads import exactly
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Rollout, Trial

BELIEF = ("encoder.history.", "encoder.gaussian.", "auxiliary.")
"""What the bound moves; the rest of the policy learns from returns."""


class VariBAD(RL2):
    """RL^2 whose memory is trained to foretell rewards."""

    class Config(RL2.Config):
        read_with = dict.fromkeys(
            [
                "belief_lr",
                "belief_trials",
                "replay_trials",
                "beliefs_per_trial",
                "kl_weight",
                "decoder",
            ],
            ("belief_updates", ()),
        )

        lr: float = Field(default=7e-4, gt=0)
        """Step size of the policy."""

        belief_lr: float = Field(default=1e-3, gt=0)
        """Step size of encoder and decoders; an encoder that does not detach has the policy's."""

        belief_updates: int = Field(default=3, ge=0, le=LARGEST_NUMBER)
        """Gradient steps on the bound after each update of the policy."""

        belief_trials: Number = 25
        """Stored trials in each of those steps."""

        replay_trials: Number = 10_000
        """Trials kept, the last ones, each with all its steps; they are part of checkpoints."""

        beliefs_per_trial: Number | None = None
        """Beliefs of a stored trial, drawn anew at each step, whose forecasts count; null takes
        that of every step, and each forecasts all steps."""

        kl_weight: float = Field(default=0.1, ge=0)
        """Weight of the divergence of each belief from the one before."""

        decoder: TrialDecoder.Config = TrialDecoder.Config()
        """What the beliefs are asked to foretell."""

    config: Config
    on_device = False

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        if not isinstance(policy.encoder, Belief):
            raise ValueError("network.encoder: varibad needs one that keeps a belief; use belief")
        if policy.value_encoder is not None:
            raise ValueError(
                "network.separate_value: a value function with an encoder of its own would have a "
                "belief that nothing trains; use false or null"
            )
        if config.decoder.heads == "next_obs" and policy.obs_norm is not None:
            raise ValueError(
                "algorithm.decoder.heads: heads are chosen by one-hot observations, which must not "
                "be scaled; set network.normalize_obs to false"
            )
        self.encoder = policy.encoder
        self.replay = TrialReplay(config.replay_trials if config.belief_updates else 1)
        if config.belief_updates:
            seen, shape = policy.seen, distribution.observation_space.shape or ()
            width = math.prod(shape) if seen is None else len(seen)
            policy.auxiliary["decoder"] = TrialDecoder(
                config.decoder, policy.encoder.latent, width, policy.policy_head.num_actions
            )

    def learning_rate(self, name: str) -> float:
        mine = BELIEF if self.encoder.detach else BELIEF[-1:]
        return self.config.belief_lr if name.startswith(mine) else self.config.lr

    def get_state(self) -> Arrays:
        """The stored trials."""
        return self.replay.get_state() if self.config.belief_updates else {}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        if state:
            self.replay.set_state(state, next(self.policy.parameters()).device)

    def update(self, trial: Trial) -> dict[str, float]:
        (rollout,), config = trial, self.config
        forward = self._forward if self.encoder.detach else pi_and_value
        loss = partial(ppo_loss, self.policy, clip=config.clip, value_coef=config.value_coef)
        loss = partial(loss, forward=forward)
        with updating_norms(self, rollout):
            batch = self._batch(rollout)
            metrics = self.optimize(
                loss, batch, epochs=config.epochs, minibatches=config.minibatches
            )
        if not config.belief_updates or not any(n.startswith(BELIEF) for n in self.names):
            return metrics
        self.replay.add(trial)
        steps = [self._update_belief() for _ in range(config.belief_updates)]
        means = torch.stack([torch.stack(list(step.values())) for step in steps]).mean(0)
        return metrics | dict(zip(steps[0], means.tolist(), strict=True))

    def _batch(self, rollout: Rollout) -> Batch:
        """With the beliefs, which the loss of the policy leaves as they are, in place of memory."""
        batch = ppo_batch(self.policy, rollout, self.config.entropy_weight(self.progress))
        if not self.encoder.detach:
            return batch
        with torch.no_grad():
            mean, log_var = self._beliefs(batch["obs"], previous_inputs(rollout))
        kept = {k: x for k, x in batch.items() if not k.startswith(("previous_", "memory."))}
        kept |= {"mean": mean, "log_var": log_var}
        return single_steps(kept)

    def _forward(self, policy: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distribution parameters and values of a batch that has beliefs in place of memory."""
        obs = batch["obs"]
        features = self.encoder.features(policy.actor_input(obs), batch["mean"], batch["log_var"])
        value = policy.value(features, obs)
        return exactly(policy.policy_head, features), value

    def _beliefs(self, obs: Tensor, previous: Previous) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (T, B, L) of the beliefs of whole trials."""
        policy = self.policy
        memory = tuple(leaf.to(obs.device) for leaf in policy.initial_memory(obs.shape[1]))
        extra = policy.extra(previous, obs)
        mean, log_var, _ = self.encoder.posterior(policy.actor_input(obs), extra, memory, None)
        return mean, log_var

    def _update_belief(self) -> dict[str, Tensor]:
        """One gradient step on stored trials."""
        config, rng = self.config, self.rng
        slots = self.replay.draw(rng, config.belief_trials)
        steps = self.replay.num_steps
        count = min(config.beliefs_per_trial or steps, steps)
        at = np.sort(rng.choice(steps, count, replace=False))
        noise = rng.standard_normal((count, len(slots), self.encoder.latent), dtype=np.float32)
        mine = slice(self.rank, None, self.world_size)
        loss, parts = self._bound(self.replay.take(slots[mine]), at, noise[:, mine])
        share = len(slots[mine]) / len(slots)
        norm = self.step_optimizer(loss * share * self.world_size, BELIEF)
        return parts | {"belief_grad_norm": norm.detach()}

    def _bound(
        self, trials: Transitions, at: np.ndarray, noise: np.ndarray
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised: minus the evidence lower bound, and its parts.

        Args:
            trials: N whole ones.
            at: (S,) steps whose beliefs are asked to foretell all T steps.
            noise: (S, N, L), standard normal.
        """
        named = {f.name: getattr(trials, f.name).transpose(0, 1) for f in fields(trials)}
        mean, log_var = self._beliefs(named["obs"], previous_of(named))
        mask = None if named["mask"].all() else named["mask"]
        kl = counted_mean(chained_kl(mean, log_var), mask)
        device = mean.device
        steps = torch.from_numpy(at).to(device)
        latent = gaussian_sample(mean[steps], log_var[steps], torch.from_numpy(noise).to(device))
        action = self.policy.policy_head.encode(named["action"])
        obs, next_obs = (self.policy.actor_input(named[n]).flatten(2) for n in ("obs", "next_obs"))
        decoder = self.policy.auxiliary["decoder"]
        weight = None if mask is None else forecasts_that_count(mask, steps)
        parts = decoder(latent, obs, action, next_obs, named["reward"], weight)
        loss = torch.stack(list(parts.values())).sum() + self.config.kl_weight * kl
        return loss, {name: x.detach() for name, x in parts.items()} | {"belief_kl": kl.detach()}


def forecasts_that_count(mask: Tensor, at: Tensor) -> Tensor:
    """(S, T, N) forecasts of steps that there are, from beliefs (S,) at steps that there are."""
    return mask[at].unsqueeze(1) & mask


def previous_of(trials: dict[str, Tensor]) -> Previous:
    """What the policy saw of the step before each step of whole trials: tensors (T, N, ...)."""
    done = trials["terminated"] | trials["truncated"]
    first = torch.zeros_like(done)
    first[0] = True
    action, reward, done = (x.roll(1, 0) for x in (trials["action"], trials["reward"], done))
    return mask_previous(action, reward, done, first)
