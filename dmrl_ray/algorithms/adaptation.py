"""Adaptation within a trial: an agent begins on a task, acts, and adapts to its experience.

    begin     a trial begins, with no experience of its task
    play      episodes, with `adapt` between them or within, as the method has it
    adapt     the state after some experience

Workers collect by these, evaluation and streams of tasks are these without learning across tasks,
and learners differentiate through the same `adapt`.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial

State: TypeAlias = Any
"""All that adapts within a trial: parameters with their optimiser's state, a belief; nothing beside
the memory, which the sampler keeps, where that is all."""

PIECE_STEPS = 1_000
"""Longest rollout of a policy that adapts by its own memory alone; bounds the storage."""


@dataclass
class Agent:
    """Agents in the middle of their trials, one for each task."""

    state: State
    adaptation_step: np.ndarray  # (B,) applications of `adapt` to experience of the task.
    unused: Rollout | None = None  # Experience to `adapt` to next.
    history: Trial = field(default_factory=list)  # Since episodes began together, for baselines.


class Adaptation(ABC):
    """How agents adapt within a trial; by default through their memory alone."""

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
        """The state of agents at the start of a trial."""
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
        """Continue a trial, and adapt.

        Args:
            sampler: whose tasks may have changed since the agent last acted.
            agent: changes as it goes.
            episodes: of each environment.
            frozen: never adapt; the memory is reset with every episode.
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
    """Streams of tasks that change without notice: one trial that continues over all of them.

    Args:
        adaptation: of the agents.
        sampler: with `envs_per_task` environments for each stream.
        streams: tasks of each stream, in order.
        episodes: of each environment on a task.

    Yields:
        The rollouts on the first task of every stream, on the second, and so on.
    """
    changes = list(zip(*streams, strict=True))
    agent = adaptation.begin(sampler, changes[0])
    for k, tasks in enumerate(changes):
        if k:
            sampler.set_tasks(tasks)
        yield list(adaptation.play(sampler, agent, episodes))
