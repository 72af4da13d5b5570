"""The inner loop of all gradient-based methods: act, step on every task, act again.

Workers adapt while they act; learners take the same steps again, by the same function, to see how
they depend on where they started. All tasks adapt in one batched operation: parameters carry a
leading task axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.adaptation import Adaptation, Agent
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.gradient_adaptation import act_per_task, leaves
from dmrl_ray.config.components import Number
from dmrl_ray.learn.per_task import (
    Parameters,
    Recordings,
    per_task,
    task_gradients,
)
from dmrl_ray.learn.trainable import check_prefixes
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
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
        read_with = dict.fromkeys(
            ("inner_steps", "evaluation_steps"), ("steps_per_adaptation", (None,))
        )

        inner_steps: Number = 1
        """Gradient steps taken on each task before the post-adaptation rollout."""

        inner_lr: float = Field(default=0.1, gt=0)  # Finn et al. 2017, section 5.3
        """Step size of those steps (alpha in the paper)."""

        evaluation_steps: Number = 3
        """Gradient steps taken on each task when evaluating."""

        trainable: tuple[str, ...] = Field(default=("",), min_length=1)
        """Prefixes of the parameter names the inner loop may change.
        ``[""]`` is everything; ``["policy_head"]`` is ANIL."""

        episodes_per_task: Number = 20
        """Environment columns that play one task side by side, one episode each per rollout."""

        steps_per_adaptation: Number | None = None
        """Environment steps between two gradient steps of one trial, which goes on; null lets
        each gradient step follow a whole episode and begins the next ones afresh. The trial's
        length says how many steps there are, and all rollouts count, not the last alone."""

        gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount per environment step."""

        gae_lambda: float = Field(default=1.0, ge=0, le=1)
        """0 trusts the fitted baseline, 1 the returns."""

    config: Config
    frozen_statistics = True
    acts_greedily = False
    corrects_for_lag = True
    on_device = True

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        policy.encoder.use_plain_operations()
        self._recordings: Recordings = {}
        check_prefixes("algorithm.trainable", config.trainable, per_task(policy, 1))
        steps = config.steps_per_adaptation
        if steps is not None and steps >= distribution.trial_steps:
            raise ValueError(
                f"algorithm.steps_per_adaptation: no gradient step fits between {steps} steps and "
                f"the end of a trial of {distribution.trial_steps}; use fewer, or null"
            )

    @property
    def envs_per_task(self) -> int:
        return self.config.episodes_per_task

    @property
    def evaluation_episodes(self) -> int:
        within = self.config.steps_per_adaptation is not None
        return self.distribution.episodes_per_trial if within else self.config.evaluation_steps + 1

    @property
    def rollouts_per_trial(self) -> int:
        """Rollouts in a trial to learn from: one before each inner step, and what comes after."""
        return self.config.inner_steps + 1

    @property
    def collected_steps(self) -> int:
        if self.config.steps_per_adaptation is not None:
            return self.distribution.trial_steps
        return self.rollouts_per_trial * self.distribution.max_episode_steps

    def own_adaptation(self) -> Adaptation:
        return self

    def initial_state(self, sampler: Sampler, num_tasks: int) -> Parameters:
        return per_task(self.policy, num_tasks)

    def rounds(self, episodes: int) -> list[int]:
        return [1] * episodes if self.config.steps_per_adaptation is None else [episodes]

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        config = self.config
        if agent.adaptation_step.any():  # Acting needs no graph of the steps so far.
            agent.state = leaves(agent.state)
        return act_per_task(
            self.policy,
            sampler,
            agent,
            agent.state,
            self._recordings,
            num_steps=config.steps_per_adaptation,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )

    def adapt(
        self, state: Parameters, experience: Rollout, *, create_graph: bool = False
    ) -> Parameters:
        """One gradient step on every task at once (Finn et al. 2017, algorithm 3, line 6)."""
        moving = [name for name in state if name.startswith(self.config.trainable)]
        gradients = task_gradients(
            self.policy, state, experience, moving, create_graph=create_graph
        )
        moved = {name: state[name] - self.inner_rate(name) * g for name, g in gradients.items()}
        return state | moved

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Act, adapt, and act again; with `steps_per_adaptation` for the family's episodes."""
        within = self.config.steps_per_adaptation is not None
        episodes = self.distribution.episodes_per_trial if within else self.rollouts_per_trial
        return list(self.play(sampler, self.begin(sampler, tasks), episodes))

    def inner_rate(self, name: str) -> float | Tensor:
        """Step size of an inner step for the parameter of this name."""
        return self.config.inner_lr

    def adaptation(self, rollouts: Trial, *, create_graph: bool) -> list[Parameters]:
        """The learner's way through what a worker lived: parameters before and after each step."""
        path = [per_task(self.policy, rollouts[0].num_tasks)]
        for rollout in rollouts:
            path.append(self.adapt(path[-1], rollout, create_graph=create_graph))
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
        return Share(mine, trial[0].envs_of(start, stop), weight)
