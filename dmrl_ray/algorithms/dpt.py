"""Decision-pretrained transformer: the best action, foretold from a set of a task's transitions.

Source: Lee et al., "Supervised Pretraining Can Learn In-Context Reinforcement Learning", 2023
(arXiv:2306.14892), algorithm 1. A model sees transitions (s, a, r, s') of a task in any order and,
after each number of them, a state in which it must name the best action; what it comes to do on a
new task is posterior sampling. Whoever played the transitions need not have been good, but must not
have known the task: else the model learns to follow.

A sequence is made of queries and transitions in turn. A query is s alone; a transition is two
inputs, s alone and then s' with a and r. So any encoder with memory will do. The paper asks for one
state throughout a sequence, here each query is another one: all are labelled, and who acts asks for
another one at each step. What follows the end of an episode is not seen by who acts, so that s
stands in its place. Left out: a context that is kept as it is within an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dmrl_ray.algorithms.adaptation import PIECE_STEPS, Agent
from dmrl_ray.algorithms.offline import Offline, open_dataset
from dmrl_ray.config.components import at_default
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.sources import DataSettings
from dmrl_ray.learn.minibatches import previous_in
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of
from dmrl_ray.types import Rollout, Task, Trial


class DPT(Offline):
    """Cloning of the best actions, in context."""

    class Config(Offline.Config):
        read_with: ClassVar = {"newest": ("experts", (None,))}

        data: DataSettings | None = None  # type: ignore[assignment]
        """Where the contexts are read; null plays them, by chance, and labels them with what one
        who knows the task would do."""

        experts: DataSettings | None = None
        """Where query states and their best actions are read, of the same tasks as the contexts;
        null takes them from the end of each history in `data`."""

        newest: float = Field(default=0.2, gt=0, le=1)
        """Share of each history, its end, whose actions count as the best."""

        @model_validator(mode="after")
        def _reads_both(self) -> DPT.Config:
            if self.experts and not self.data:
                raise ValueError("experts: name the data of the same tasks, or leave out both")
            if not self.data and not at_default(self, "newest"):
                raise ValueError("newest: is read only where data is set; leave it out")
            return self

    config: Config
    memory_spans_trial = True
    _experts: Dataset | None = None
    _tasks: Sequence[str] = ()

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        if not policy.recurrent:
            raise ValueError("network.encoder: dpt needs one with memory, such as a transformer")
        if not config.data and not isinstance(distribution.action_space, gym.spaces.Discrete):
            raise ValueError("algorithm.data: dpt plays discrete actions only; record a stage")

    @property
    def asked(self) -> str | None:
        return None if self.config.data else "best_action"

    @property
    def experts(self) -> Dataset:
        """Whose actions are the best."""
        if self._experts is None:
            settings = self.config.experts
            self._experts = open_dataset(self, settings) if settings else self.dataset
        return self._experts

    @property
    def collected_steps(self) -> int:
        steps = self.num_steps
        return steps if self.config.data else min(steps, self.distribution.trial_steps)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Transitions of a task in each column, and the best actions in the same states."""
        if self.config.data:
            return super().collect(sampler, tasks)
        space = self.distribution.action_space
        assert isinstance(space, gym.spaces.Discrete)
        pi = _by_chance(sampler.rng, sampler.num_envs, int(space.n))
        best: list[np.ndarray] = []

        def actor(
            obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
        ) -> tuple[Tensor, Tensor, Memory]:
            best.append(answer_of(self.distribution, sampler.env.best_action))
            return pi, pi, memory

        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        played = sampler.rollout(self.policy, self.num_steps, actor=actor, with_value=False)
        played.expert_action = np.stack(best)
        return [played]

    def read(self, rng: np.random.Generator, columns: int) -> Trial:
        """Transitions of a task in each column, and best actions on the same task."""
        newest = 1.0 if self.config.experts else self.config.newest
        if not self._tasks:
            self._tasks = sorted({*self.dataset.tasks_of(1.0)} & {*self.experts.tasks_of(newest)})
        if not self._tasks:
            raise ValueError("algorithm.experts: its tasks are none of the tasks in data")
        names = [self._tasks[i] for i in rng.integers(len(self._tasks), size=columns)]
        context = self.dataset.of_tasks(rng, names, self.num_steps)
        return [context, self.experts.of_tasks(rng, names, self.num_steps, newest=newest)]

    def batch(self, trial: Trial) -> dict[str, Tensor]:
        """A query, and for each transition, in a random order, two inputs and another query."""
        context, query = trial[0], trial[-1]
        best = query.action if self.config.data else query.expert_action
        steps, columns = context.reward.shape
        device = context.reward.device
        shuffled = self.rng.permuted(np.tile(np.arange(steps)[:, None], columns), axis=0)
        drawn = self.rng.integers(query.num_steps, size=(steps + 1, columns))
        order, asked = (torch.from_numpy(x).to(device) for x in (shuffled, drawn))
        if not context.all_count:  # Transitions that count come first.
            last = (~context.mask.gather(0, order)).to(torch.uint8).argsort(dim=0, stable=True)
            order = order.gather(0, last)
        b = torch.arange(columns, device=device)
        obs, action, reward = context.obs[:-1], context.action, context.reward
        done = context.terminated | context.truncated
        after = torch.where(_like(done, obs), obs, context.next_obs())
        states = query.obs[asked, b]
        parts = [(states[:-1], obs[order, b], after[order, b])]
        before = _nothing(action, reward)
        for none, x in zip(before, (action, reward, done), strict=True):
            parts.append((none, none, x[order, b]))
        last = (states[-1], *(x[0] for x in before))
        names = ("obs", "previous_action", "previous_reward", "previous_done")
        shown = {
            name: torch.cat([torch.stack(part, 1).flatten(0, 1), end.unsqueeze(0)])
            for name, part, end in zip(names, parts, last, strict=True)
        }  # (3 T + 1, B, ...)
        if not context.all_count:  # A query after n transitions counts where there are as many.
            known = torch.arange(steps + 1, device=device).unsqueeze(1)
            shown["mask"] = known <= context.mask.sum(0)
        return shown | {"action": best[asked, b]}

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pi, _, _ = self.policy(batch["obs"], previous_in(batch), self.empty_memory(batch))
        pi = pi[::3]  # the queries
        head, mask = self.policy.policy_head, batch.get("mask")
        loss = -counted_mean(head.log_prob(pi, batch["action"]), mask)
        return loss, {"entropy": counted_mean(head.entropy(pi), mask)}

    def check_continued(self) -> None:
        """Refuse: an actor under other parameters would not ask its context.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "by: dpt acts by asking its context, which gradient steps leave out; use own"
        )

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        return sampler.rollout(self.policy, PIECE_STEPS, actor=self._act, with_value=False)

    def _act(
        self, obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Take in the transition that led here, and ask; memory ends with the last observation."""
        assert previous is not None
        before = _nothing(*previous[:2])
        if reset is None:
            *kept, last = memory
            last = last.unsqueeze(0)
            after = torch.where(_like(previous[2], obs), last, obs)
            shown = torch.cat([last, after, obs])
            inputs = [torch.cat([none, x, none]) for none, x in zip(before, previous, strict=True)]
            pi, features, remembered = self.policy(shown, tuple(inputs), tuple(kept))
        else:  # All columns at once: memory spans the trial.
            remembered = self.policy.initial_memory(obs.shape[1])
            pi, features, remembered = self.policy(obs, before, remembered)
        return pi[-1:], features[-1:], (*remembered, obs[0].clone())


def _by_chance(rng: np.random.Generator, columns: int, actions: int) -> Tensor:
    """(1, B, A) logits of policies, random chances mixed with one action, as the paper's."""
    share = rng.integers(11, size=(columns, 1)) / 10
    one = np.eye(actions)[rng.integers(actions, size=columns)]
    chance = (1 - share) * rng.dirichlet(np.ones(actions), columns) + share * one
    return torch.from_numpy(np.log(chance + 1e-30, dtype=np.float32)).unsqueeze(0)


def _like(done: Tensor, obs: Tensor) -> Tensor:
    """(T, B) with as many dimensions as observations have."""
    return done.reshape(*done.shape, *[1] * (obs.dim() - 2))


def _nothing(action: Tensor, reward: Tensor) -> Previous:
    """What is shown where nothing came before."""
    none = -1 if action.dtype == torch.int64 else 0
    ended = torch.ones_like(reward, dtype=torch.bool)
    return torch.full_like(action, none), torch.zeros_like(reward), ended
