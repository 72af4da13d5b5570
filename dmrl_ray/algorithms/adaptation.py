"""What happens to an agent on one task: it begins, acts, and adapts to what it has seen.

    begin     a trial begins, and nothing is known of its task
    play      episodes, with `adapt` between them or within, as the method has it
    adapt     a state after some experience

Workers collect by these, evaluation and streams of tasks are these without learning across tasks,
and learners differentiate through the same `adapt`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from dmrl_ray.config.schema import ContinuedTraining
from dmrl_ray.learn.task_actor import Recordings, task_actor
from dmrl_ray.learn.task_optimizer import Descending, TaskOptimizer
from dmrl_ray.learn.task_params import (
    Parameters,
    fitted_advantage,
    number_of_tasks,
    per_task,
    task_gradients,
)
from dmrl_ray.learn.trainable import check_prefixes
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial

State: TypeAlias = Any
"""What adapts within a trial: parameters with their optimiser's state, a belief; nothing beside
the memory, which the sampler keeps, where that is all that adapts."""

PIECE_STEPS = 1_000
"""Longest rollout of a policy whose steps nobody but its own memory needs; bounds the memory."""


@dataclass
class Agent:
    """Agents in the middle of their trials, one for each task."""

    state: State
    adaptation_step: np.ndarray  # (B,) applications of `adapt` that had something of the task.
    unused: Rollout | None = None  # Experience that `adapt` has not seen.
    history: Trial = field(default_factory=list)  # Since episodes began together, for baselines.


class Adaptation(ABC):
    """How agents adapt within a trial. By default by what they remember alone."""

    policy: ActorCritic

    memory_spans_trial: bool = False
    """The policy's memory, and so returns, survive the ends of episodes."""

    acts_greedily: bool = True
    """Where `greedy` asks for it; False always samples, as gradients of returns need it."""

    @property
    def envs_per_task(self) -> int:
        """Environments that play one task side by side."""
        return 1

    def initial_state(self, sampler: Sampler, num_tasks: int) -> State:
        """What agents know where a trial begins."""
        return ()

    def adapt(self, state: State, experience: Rollout) -> State:
        """The state after some more experience; memory adapts inside the forward pass."""
        return state

    def rounds(self, episodes: int) -> list[int]:
        """Episodes of each environment between resets of all of them together."""
        return [episodes]

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        """Act until the next application of `adapt`, or until the round's episodes are played."""
        return sampler.rollout(self.policy, PIECE_STEPS, with_value=False)

    def begin(self, sampler: Sampler, tasks: Sequence[Task]) -> Agent:
        """Put every environment at the start of a trial."""
        sampler.begin_trial(tasks, self.policy)
        never = np.zeros(sampler.num_envs, np.int64)
        return Agent(self.initial_state(sampler, len(tasks)), never)

    def play(
        self, sampler: Sampler, agent: Agent, episodes: int, *, frozen: bool = False
    ) -> Iterator[Rollout]:
        """Go on with a trial, and adapt.

        Args:
            sampler: whose tasks may have changed since the agent last acted.
            agent: changes as it goes.
            episodes: of each environment.
            frozen: never adapt; memory begins afresh with every episode.
        """
        for quota in [1] * episodes if frozen else self.rounds(episodes):
            sampler.begin_episodes(quota, forget=frozen or not self.memory_spans_trial)
            while sampler.playing:
                if agent.unused is not None and not frozen:
                    agent.state = self.adapt(agent.state, agent.unused.map(torch.as_tensor))
                    agent.adaptation_step = agent.adaptation_step + agent.unused.has_experience()
                agent.unused = self.act(sampler, agent)
                yield agent.unused


def play_stream(
    adaptation: Adaptation, sampler: Sampler, streams: Sequence[Sequence[Task]], episodes: int
) -> Iterator[Trial]:
    """Streams of tasks that change without notice: one trial that goes on over all of them.

    Args:
        adaptation: of the agents.
        sampler: with `envs_per_task` environments for each stream.
        streams: tasks of each stream, in order.
        episodes: of each environment on a task.

    Yields:
        What was played on the first task of every stream, on the second, and so on.
    """
    changes = list(zip(*streams, strict=True))
    agent = adaptation.begin(sampler, changes[0])
    for k, tasks in enumerate(changes):
        if k:
            sampler.set_tasks(tasks)
        yield list(adaptation.play(sampler, agent, episodes))


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
