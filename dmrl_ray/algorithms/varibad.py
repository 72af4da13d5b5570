"""VariBAD: a policy that acts on a learned belief about the task.

Source: Zintgraf et al., "VariBAD: A Very Good Method for Bayes-Adaptive Deep RL via
Meta-Learning", 2020 (arXiv:1910.08348), section 3. PPO on whole trials trains the policy, which
observes the posterior's mean and log-variance beside the observation; a variational bound on the
whole trial, its past and its future, trains encoder and decoder. Left out: Huber and clipped value
losses, and running statistics of the posterior.

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
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.ppo import ppo_batch, ppo_loss
from dmrl_ray.algorithms.rl2 import RL2, with_trial_advantage
from dmrl_ray.config.components import LARGEST_NUMBER, Number
from dmrl_ray.data.replay import ReplayBuffer, Transitions
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import pi_and_value, single_steps
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.latent import chained_kl, gaussian_sample, negative_elbo
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, mask_previous, previous_inputs
from dmrl_ray.networks.belief import Belief
from dmrl_ray.networks.decoder import TrialDecoder
from dmrl_ray.networks.heads import exactly
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Rollout, Task, Trial

BELIEF = ("encoder.history.", "encoder.gaussian.", "auxiliary.")
"""Prefixes of the parameters that the bound trains: encoder (phi) and decoder (theta)."""


class VariBAD(Algorithm):
    """RL^2 on the posterior of a variational autoencoder of trials."""

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
        """Trials stored, the last ones, each with all its steps; they are part of checkpoints."""

        beliefs_per_trial: Number | None = None
        """Steps of a stored trial, drawn at each gradient step, from whose posteriors the whole
        trial is predicted; null takes all of them."""

        kl_weight: float = Field(default=0.1, ge=0)
        """Weight of the divergence of each posterior from the one before."""

        decoder: TrialDecoder.Config = TrialDecoder.Config()
        """The decoder, and which parts of a trial it predicts."""

    config: Config
    memory_spans_trial = True
    corrects_for_lag = True
    compiles = True

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
        self.replay = ReplayBuffer(config.replay_trials if config.belief_updates else 1)
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

    @property
    def collected_steps(self) -> int:
        return self.distribution.trial_steps

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """A trial of each task, in which the policy acts on its belief."""
        config = self.config
        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        rollout = sampler.rollout(self.policy)
        return [with_trial_advantage(rollout, gamma=config.gamma, gae_lambda=config.gae_lambda)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Section 3.2: the return moves the policy (psi), the bound encoder and decoder."""
        (rollout,), config = trial, self.config
        metrics = self.update_policy(rollout)
        if not config.belief_updates or not any(n.startswith(BELIEF) for n in self.names):
            return metrics
        self.replay.add(trial)
        steps = [self.update_belief() for _ in range(config.belief_updates)]
        means = torch.stack([torch.stack(list(step.values())) for step in steps]).mean(0)
        return metrics | dict(zip(steps[0], means.tolist(), strict=True))

    def update_policy(self, rollout: Rollout) -> dict[str, float]:
        """PPO on the return, at fixed beliefs where the encoder detaches them."""
        config, detach = self.config, self.encoder.detach
        loss = partial(
            ppo_loss,
            self.policy,
            clip=config.clip,
            value_coef=config.value_coef,
            forward=pi_and_value_of_belief if detach else pi_and_value,
        )
        with updating_norms(self, rollout):
            batch = ppo_batch(self.policy, rollout, config.entropy_weight(self.progress))
            if detach:
                batch = with_beliefs(self.policy, rollout, batch)
            return self.optimize(loss, batch, epochs=config.epochs, minibatches=config.minibatches)

    def update_belief(self) -> Report:
        """A gradient step on the bound, over stored trials."""
        config, rng = self.config, self.rng
        slots = self.replay.sample(rng, config.belief_trials)
        num_steps = self.replay.num_steps
        count = min(config.beliefs_per_trial or num_steps, num_steps)
        at = np.sort(rng.choice(num_steps, count, replace=False))
        noise = rng.standard_normal((count, len(slots), self.encoder.latent), dtype=np.float32)
        mine = slice(self.rank, None, self.world_size)
        trials = self.replay.take(slots[mine])
        loss, report = elbo_loss(
            self.policy, trials, at, noise[:, mine], kl_weight=config.kl_weight
        )
        share = len(slots[mine]) / len(slots)
        norm = self.step_optimizer(loss * share * self.world_size, BELIEF)
        return report | {"belief_grad_norm": norm.detach()}


def posterior(policy: ActorCritic, obs: Tensor, previous: Previous) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (T, B, L) of q(m | tau_:t) at every step t of whole trials."""
    encoder = policy.encoder
    assert isinstance(encoder, Belief)
    memory = tuple(leaf.to(obs.device) for leaf in policy.initial_memory(obs.shape[1]))
    extra = policy.extra(previous, obs)
    mean, log_var, _ = encoder.posterior(policy.actor_input(obs), extra, memory, None)
    return mean, log_var


def with_beliefs(policy: ActorCritic, rollout: Rollout, batch: Batch) -> Batch:
    """The batch with posteriors, which the loss of the policy leaves fixed, in place of memory."""
    with torch.no_grad():
        mean, log_var = posterior(policy, batch["obs"], previous_inputs(rollout))
    kept = {k: x for k, x in batch.items() if not k.startswith(("previous_", "memory."))}
    return single_steps(kept | {"mean": mean, "log_var": log_var})


def pi_and_value_of_belief(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    """Distribution parameters and normalised values of a batch from `with_beliefs`."""
    encoder, obs = policy.encoder, batch["obs"]
    assert isinstance(encoder, Belief)
    features = encoder.features(policy.actor_input(obs), batch["mean"], batch["log_var"])
    value = policy.value(features, obs)
    return exactly(policy.policy_head, features), value


def elbo_loss(
    policy: ActorCritic,
    trials: Transitions,
    at: np.ndarray,
    noise: np.ndarray,
    *,
    kl_weight: float,
) -> tuple[Tensor, Report]:
    """Minus the evidence lower bounds ELBO_t of stored trials (eq. 7), and their terms.

    Args:
        policy: with the decoder in ``auxiliary``.
        trials: N whole ones.
        at: (S,) steps t from whose posterior all T steps are predicted.
        noise: (S, N, L), standard normal.
        kl_weight: of the KL term, 1 in the bound.
    """
    named = {f.name: getattr(trials, f.name).transpose(0, 1) for f in fields(trials)}
    mean, log_var = posterior(policy, named["obs"], previous_of(named))  # q(m | tau_:t)
    mask = None if named["mask"].all() else named["mask"]
    kl = counted_mean(chained_kl(mean, log_var), mask)  # KL(q(m | tau_:t) || q(m | tau_:t-1))
    steps = torch.from_numpy(at).to(mean.device)
    noises = torch.from_numpy(noise).to(mean.device)
    latent = gaussian_sample(mean[steps], log_var[steps], noises)  # m ~ q(m | tau_:t)
    action = policy.policy_head.encode(named["action"])
    obs, next_obs = (policy.actor_input(named[n]).flatten(2) for n in ("obs", "next_obs"))
    counted = None if mask is None else counted_predictions(mask, steps)
    decoder = policy.auxiliary["decoder"]
    losses = decoder(latent, obs, action, next_obs, named["reward"], counted)  # eq. 8
    loss = negative_elbo(list(losses.values()), kl, kl_weight=kl_weight)
    return loss, {name: x.detach() for name, x in losses.items()} | {"belief_kl": kl.detach()}


def counted_predictions(mask: Tensor, at: Tensor) -> Tensor:
    """(S, T, N) predictions of steps that count, from posteriors (S,) at steps that count."""
    return mask[at].unsqueeze(1) & mask


def previous_of(trials: dict[str, Tensor]) -> Previous:
    """The step before each step of whole trials, as the policy observed it: tensors (T, N, ...)."""
    done = trials["terminated"] | trials["truncated"]
    first = torch.zeros_like(done)
    first[0] = True
    action, reward, done = (x.roll(1, 0) for x in (trials["action"], trials["reward"], done))
    return mask_previous(action, reward, done, first)
