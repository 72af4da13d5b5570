"""The inner loop of all gradient-based methods: act, step on every task, act again.

Workers adapt while they act; learners take the same steps again, by the same function, to see how
they depend on where they started. All tasks adapt in one batched operation: parameters carry a
leading task axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.parts import check_prefixes
from dmrl_ray.algorithms.task_actor import Recordings, task_actor
from dmrl_ray.algorithms.task_params import (
    Parameters,
    fitted_advantage,
    per_task,
    task_gradients,
)
from dmrl_ray.policy import ActorCritic
from dmrl_ray.rollout import Sampler
from dmrl_ray.tasks import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


@dataclass(frozen=True)
class Share:
    """Some tasks of a trial, their columns in it, and the weight of their mean in that over all."""

    trial: Trial
    columns: slice
    weight: float


class GradientAdaptation(Algorithm):
    """A policy that adapts by gradient steps; what its outer loop makes of them is left open.

    The inner loss is an importance-weighted surrogate (Rothfuss et al. 2019, arXiv:1810.06784,
    eq. 9), so that its gradient stays right when the outer loop has moved the parameters away
    from those that acted.
    """

    class Config(Algorithm.Config):
        inner_steps: int = Field(default=1, ge=1)
        """Gradient steps taken on each task before the post-adaptation rollout."""

        inner_lr: float = Field(default=0.1, gt=0)  # Finn et al. 2017, section 5.3
        """Step size of those steps (alpha in the paper)."""

        evaluation_steps: int = Field(default=3, ge=1)
        """Gradient steps taken on each task when evaluating."""

        adapt: tuple[str, ...] = ("",)
        """Prefixes of the parameter names the inner loop may change.
        ``[""]`` is everything; ``["policy_head"]`` is ANIL."""

        episodes_per_task: int = Field(default=20, ge=1)
        """Environment columns that play one task side by side, one episode each per rollout."""

        steps_per_adaptation: int | None = Field(default=None, ge=1)
        """Environment steps between two gradient steps of one trial, which goes on; null lets
        each gradient step follow a whole episode and begins the next ones afresh. The trial's
        length says how many steps there are, and all rollouts count, not the last alone."""

        gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount per environment step."""

        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        """0 trusts the fitted baseline, 1 the returns."""

    config: Config
    frozen_statistics = True
    corrects_for_lag = True
    on_device = True

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        policy.encoder.use_plain_operations()
        self._recordings: Recordings = {}
        check_prefixes("algorithm.adapt", config.adapt, per_task(policy, 1))
        steps = config.steps_per_adaptation
        if steps is not None and steps >= distribution.trial_steps:
            raise ValueError(
                f"algorithm.steps_per_adaptation: no gradient step fits between {steps} steps and "
                f"the end of a trial of {distribution.trial_steps}; use fewer, or null"
            )

    @property
    def columns_per_task(self) -> int:
        return self.config.episodes_per_task

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        return self.live(sampler, tasks, self.config.inner_steps + 1)

    def evaluate(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        return self.live(sampler, tasks, self.config.evaluation_steps + 1)

    def live(self, sampler: Sampler, tasks: list[Task], rounds: int) -> Trial:
        """Rollout, inner step, rollout, ...: `rounds` rollouts with a step between any two.

        With `steps_per_adaptation` there are as many as the trial's episodes take.
        """
        config = self.config
        part = config.steps_per_adaptation
        within = part is not None
        params = per_task(self.policy, len(tasks))
        trial: Trial = []
        sampler.begin_trial(
            tasks, self.policy, self.distribution.episodes_per_trial if within else 1
        )
        while sampler.playing if within else len(trial) < rounds:
            if trial:
                moved = self.inner_step(params, trial[-1].map(torch.as_tensor), create_graph=False)
                params = {name: p.detach().requires_grad_() for name, p in moved.items()}
                if not within:
                    sampler.begin_episodes(1)
            rollout = sampler.rollout(
                self.policy,
                part,
                actor=task_actor(self.policy, params, self._recordings),
                adaptation_step=len(trial),
                with_value=False,
                greedy=False,
            )
            trial.append(rollout)
            seen = trial if within else trial[-1:]
            rollout.advantage = fitted_advantage(
                seen, len(tasks), gamma=config.gamma, gae_lambda=config.gae_lambda
            )
        return trial

    def inner_step(self, params: Parameters, rollout: Rollout, *, create_graph: bool) -> Parameters:
        """One gradient step on every task at once; the same in workers and learners."""
        moving = [name for name in params if name.startswith(self.config.adapt)]
        gradients = task_gradients(self.policy, params, rollout, moving, create_graph=create_graph)
        moved = {
            name: params[name] - self.inner_rate(name) * gradient
            for name, gradient in gradients.items()
        }
        return params | moved

    def inner_rate(self, name: str) -> float | Tensor:
        """Step size of an inner step for the parameter of this name."""
        return self.config.inner_lr

    def adaptation(self, rollouts: Trial, *, create_graph: bool) -> list[Parameters]:
        """The learner's way through what a worker lived: parameters before and after each step."""
        path = [per_task(self.policy, rollouts[0].num_tasks)]
        for rollout in rollouts:
            path.append(self.inner_step(path[-1], rollout, create_graph=create_graph))
        return path

    def own_tasks(self, trial: Trial) -> Share:
        """What this learner takes of a trial's tasks; with none left, one that counts nothing.

        Weights are for the average over learners, so that without others it is 1.
        """
        num_tasks = trial[0].num_tasks
        start, stop = (num_tasks * (self.rank + i) // self.world_size for i in (0, 1))
        weight = (stop - start) * self.world_size / num_tasks
        if start == stop:
            start, stop = 0, 1
        mine = [rollout.of_tasks(start, stop) for rollout in trial]
        return Share(mine, trial[0].columns_of(start, stop), weight)
