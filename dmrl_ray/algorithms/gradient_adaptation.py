"""Adaptation by gradient steps, of each task by itself."""

from __future__ import annotations

from dataclasses import replace

from dmrl_ray.algorithms.adaptation import Adaptation, Agent
from dmrl_ray.config.schema import ContinuedTraining
from dmrl_ray.learn.per_task import (
    Descending,
    Parameters,
    Recordings,
    TaskOptimizer,
    fitted_advantage,
    number_of_tasks,
    per_task,
    task_actor,
    task_gradients,
)
from dmrl_ray.learn.trainable import check_prefixes
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout


def act_per_task(
    policy: ActorCritic,
    sampler: Sampler,
    agent: Agent,
    params: Parameters,
    recordings: Recordings,
    *,
    num_steps: int | None = None,
    gamma: float,
    gae_lambda: float,
) -> Rollout:
    """Act under every task's own parameters, with the advantages that a gradient step needs."""
    if sampler.fresh:
        agent.history = []
    rollout = sampler.rollout(
        policy,
        num_steps,
        actor=task_actor(policy, params, recordings),
        adaptation_step=agent.adaptation_step,
        with_value=False,
        greedy=False,
    )
    agent.history.append(rollout)
    rollout.advantage = fitted_advantage(
        agent.history, number_of_tasks(params), gamma=gamma, gae_lambda=gae_lambda
    )
    return rollout


def leaves(params: Parameters) -> Parameters:
    """The same numbers, with gradients of their own."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


class Continued(Adaptation):
    """Training goes on, on each task by itself: a policy-gradient step after every round.

    It adapts any policy whose actor is differentiable in plain operations.

    Args:
        policy: what every task starts from.
        settings: of the rounds, and of what moves.
        optimizer: of the steps.
        gamma: discount of the returns.
        memory_spans_trial: of the policy.

    Raises:
        ValueError: the policy has a memory that gradient steps cannot adapt, or a part to move does
            not exist.
    """

    acts_greedily = False

    def __init__(
        self,
        policy: ActorCritic,
        settings: ContinuedTraining,
        optimizer: TaskOptimizer,
        *,
        gamma: float,
        memory_spans_trial: bool,
    ) -> None:
        policy.encoder.use_plain_operations()
        check_prefixes("by.trainable", settings.trainable, per_task(policy, 1))
        self.policy = policy
        self.settings = settings
        self.optimizer = optimizer
        self.gamma = gamma
        self.memory_spans_trial = memory_spans_trial
        self._recordings: Recordings = {}

    @property
    def envs_per_task(self) -> int:
        return self.settings.episodes

    def initial_state(self, sampler: Sampler, num_tasks: int) -> Descending:
        return Descending(per_task(self.policy, num_tasks))

    def rounds(self, episodes: int) -> list[int]:
        return [1] * episodes

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        return act_per_task(
            self.policy,
            sampler,
            agent,
            agent.state.params,
            self._recordings,
            gamma=self.gamma,
            gae_lambda=1.0,
        )

    def adapt(self, state: Descending, experience: Rollout) -> Descending:
        """One gradient step on every task at once."""
        moving = [name for name in state.params if name.startswith(self.settings.trainable)]
        gradients = task_gradients(
            self.policy, state.params, experience, moving, create_graph=False
        )
        return self.step(state, gradients)

    def step(self, state: Descending, gradients: Parameters) -> Descending:
        """One step of the optimiser along these gradients, within the parameters' bounds."""
        moved = self.optimizer.step(state, gradients)
        bounds = self.policy.bounds
        bounded = {n: moved.params[n].clamp(*bounds[n]) for n in gradients if n in bounds}
        return replace(moved, params=leaves(moved.params | bounded))
