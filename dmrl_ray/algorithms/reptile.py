"""Reptile: move the initialisation towards the parameters adapted to each task.

Source: Nichol et al., "On First-Order Meta-Learning Algorithms", 2018 (arXiv:1803.02999),
algorithm 2, with the mean over tasks of (theta - theta'_i) / inner_lr as a gradient for the outer
optimiser (section 5.1 there). With one inner step this is joint training on all tasks; with more,
tasks whose gradients agree from step to step count more. There is no rollout after the last
inner step: the step itself is what is learned from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmrl_ray.algorithms.adaptation import Agent
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.gradient_adaptation import InnerLoop
from dmrl_ray.config.components import Number
from dmrl_ray.learn.per_task import (
    Parameters,
    descend_over_tasks,
    per_task,
    surrogate_loss,
    task_gradients,
)
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


class Reptile(Algorithm):
    """Adapt by gradient steps; move the initialisation towards the adapted parameters."""

    class Config(InnerLoop.Config):
        inner_steps: Number = 3
        """Gradient steps taken on each task; with one, nothing is learned about adaptation."""

    config: Config
    frozen_statistics = True
    acts_greedily = False
    corrects_for_lag = True
    on_device = True

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        self.inner_loop = InnerLoop(config, distribution, policy, rollouts=config.inner_steps)

    def adapt(self, params: Parameters, support: Rollout) -> Parameters:
        """One of the k steps of SGD on every task at once."""
        loss = surrogate_loss(self.policy, params, support)  # (N,)
        gradients = task_gradients(loss, params, self.config.trainable)
        lr = self.config.inner_lr
        return params | {name: params[name] - lr * g for name, g in gradients.items()}

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Act on every task before each of the k steps."""
        agent = self.begin(sampler, tasks)
        return list(self.play(sampler, agent, self.inner_loop.episodes))

    def update(self, trial: Trial) -> dict[str, float]:
        """theta <- theta + beta * mean over tasks of (theta'_i - theta) / inner_lr."""
        skipped = self.skipped_batches
        norm = descend_over_tasks(self, self.surrogate, trial)["grad_norm"]
        if self.skipped_batches == skipped:
            self.policy.update_obs_norm(torch.cat([r.counted(r.obs[:-1]) for r in trial]))
        first, last = (r.mean_return() for r in (trial[0], trial[-1]))
        return {"grad_norm": norm, "return/before": first, "return/last": last}

    def surrogate(self, trial: Trial) -> Tensor:
        """A loss whose gradient is the mean over tasks of (theta - theta'_i) / inner_lr."""
        start, *_, end = self.adapted_params(trial)
        with torch.no_grad():
            scale = 1 / self.config.inner_lr
            gradient = {n: (start[n] - end[n]).mean(0) * scale for n in start}
        theta = dict(self.policy.named_parameters())
        return torch.stack([(theta[n] * g).sum() for n, g in gradient.items()]).sum()

    def adapted_params(self, trial: Trial) -> list[Parameters]:
        """theta of every task, and the parameters after each of k steps; the last is theta'_i."""
        params = [per_task(self.policy, trial[0].num_tasks)]
        for rollout in trial:
            params.append(self.adapt(params[-1], rollout))
        return params

    @property
    def envs_per_task(self) -> int:
        return self.config.episodes_per_task

    @property
    def collected_steps(self) -> int:
        return self.inner_loop.collected_steps

    @property
    def evaluation_episodes(self) -> int:
        return self.inner_loop.evaluation_episodes

    def initial_state(self, sampler: Sampler, num_tasks: int) -> Parameters:
        return per_task(self.policy, num_tasks)

    def rounds(self, episodes: int) -> list[int]:
        return self.inner_loop.rounds(episodes)

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        return self.inner_loop.act(sampler, agent)
