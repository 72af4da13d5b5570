"""Decision-pretrained transformer: predicts the best action from a set of a task's transitions.

Source: Lee et al., "Supervised Pretraining Can Learn In-Context Reinforcement Learning", 2023
(arXiv:2306.14892), algorithm 1. A model observes transitions (s, a, r, s') of a task in any order
and, after each number of them, a query state, of which it predicts the best action; on a new task
that comes to posterior sampling. The policy that collected the transitions need not have been good,
but must not have known the task: else the model learns to imitate it.

A sequence alternates between queries and transitions. A query is s alone; a transition is two
inputs, s alone and then s' with a and r. So any encoder with memory will do. The paper has one
query state throughout a sequence, here each query has its own: all are labelled, and the acting
policy has another one at each step. The state after an episode's end is not observed in acting, so
that s replaces it. Left out: a context that is kept as it is within an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dmrl_ray.algorithms.adaptation import PIECE_STEPS, Agent
from dmrl_ray.algorithms.offline import Offline, empty_memory, open_dataset
from dmrl_ray.config.components import at_default
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.sources import DataSettings
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import previous_in
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.imitation import expert_action_loss
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of
from dmrl_ray.types import Rollout, Task, Trial


class DPT(Offline):
    """Maximum likelihood of the best actions, in context."""

    class Config(Offline.Config):
        read_with: ClassVar = {"newest": ("experts", (None,))}

        data: DataSettings | None = None  # type: ignore[assignment]
        """Where the contexts are read; null plays them, at random, and labels them with the best
        actions, as the family knows them."""

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
    def label_method(self) -> str | None:
        return None if self.config.data else "best_action"

    @property
    def experts(self) -> Dataset:
        """The data whose actions are the best."""
        if self._experts is None:
            settings = self.config.experts
            self._experts = open_dataset(self, settings) if settings else self.dataset
        return self._experts

    @property
    def collected_steps(self) -> int:
        steps = self.num_steps
        return steps if self.config.data else min(steps, self.distribution.trial_steps)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Algorithm 1, pretraining dataset: in-context datasets, queries and their best actions."""
        if self.config.data:
            return self._recorded(sampler.rng, sampler.num_envs)
        return [self._played(sampler, tasks)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Algorithm 1, pretraining: maximise the likelihood of the best actions."""
        context, query = trial[0], trial[-1]
        best = query.action if self.config.data else query.expert_action
        batch = dpt_batch(context, query, best, self.rng)
        return self.fit(partial(dpt_loss, self.policy), batch, context)

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        """Algorithm 1, online deployment: the context grows by every step."""
        return sampler.rollout(self.policy, PIECE_STEPS, actor=self._act, with_value=False)

    def check_continued(self) -> None:
        """Refuse: an actor under other parameters would not query its context.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "by: dpt acts by asking its context, which gradient steps leave out; use own"
        )

    def _played(self, sampler: Sampler, tasks: list[Task]) -> Rollout:
        """Transitions under random policies, and the best actions in the same states."""
        space = self.distribution.action_space
        assert isinstance(space, gym.spaces.Discrete)
        pi = _random_policies(sampler.rng, sampler.num_envs, int(space.n))
        best: list[np.ndarray] = []

        def actor(
            obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
        ) -> tuple[Tensor, Tensor, Memory]:
            best.append(answer_of(self.distribution, sampler.env.best_action))
            return pi, pi, memory

        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        played = sampler.rollout(self.policy, self.num_steps, actor=actor, with_value=False)
        played.expert_action = np.stack(best)
        return played

    def _recorded(self, rng: np.random.Generator, envs: int) -> Trial:
        """Transitions of a task for each environment, and best actions on the same task."""
        newest = 1.0 if self.config.experts else self.config.newest
        if not self._tasks:
            self._tasks = sorted({*self.dataset.tasks_of(1.0)} & {*self.experts.tasks_of(newest)})
        if not self._tasks:
            raise ValueError("algorithm.experts: its tasks are none of the tasks in data")
        names = [self._tasks[i] for i in rng.integers(len(self._tasks), size=envs)]
        context = self.dataset.of_tasks(rng, names, self.num_steps)
        return [context, self.experts.of_tasks(rng, names, self.num_steps, newest=newest)]

    def _act(
        self, obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Add the transition that led here to the context, and query it with the observation.

        The last observation is kept at the end of the memory.
        """
        assert previous is not None
        before = _no_previous(*previous[:2])
        if reset is None:
            *kept, last = memory
            last = last.unsqueeze(0)
            after = torch.where(_like(previous[2], obs), last, obs)
            states = torch.cat([last, after, obs])
            inputs = [torch.cat([none, x, none]) for none, x in zip(before, previous, strict=True)]
            pi, features, remembered = self.policy(states, tuple(inputs), tuple(kept))
        else:  # All environments at once: memory spans the trial.
            remembered = self.policy.initial_memory(obs.shape[1])
            pi, features, remembered = self.policy(obs, before, remembered)
        return pi[-1:], features[-1:], (*remembered, obs[0].clone())


def _random_policies(rng: np.random.Generator, envs: int, actions: int) -> Tensor:
    """(1, B, A) logits: random probabilities mixed with one action, as in the paper's bandits."""
    share = rng.integers(11, size=(envs, 1)) / 10
    one = np.eye(actions)[rng.integers(actions, size=envs)]
    probabilities = (1 - share) * rng.dirichlet(np.ones(actions), envs) + share * one
    return torch.from_numpy(np.log(probabilities + 1e-30, dtype=np.float32)).unsqueeze(0)


def dpt_batch(context: Rollout, query: Rollout, best: Tensor, rng: np.random.Generator) -> Batch:
    """A query, and for each transition, in a random order, two inputs and another query."""
    steps, envs = context.reward.shape
    device = context.reward.device
    shuffled = rng.permuted(np.tile(np.arange(steps)[:, None], envs), axis=0)
    drawn = rng.integers(query.num_steps, size=(steps + 1, envs))
    order, asked = (torch.from_numpy(x).to(device) for x in (shuffled, drawn))
    if not context.all_count:  # Transitions that count come first.
        last = (~context.mask.gather(0, order)).to(torch.uint8).argsort(dim=0, stable=True)
        order = order.gather(0, last)
    b = torch.arange(envs, device=device)
    obs, action, reward = context.obs[:-1], context.action, context.reward
    done = context.terminated | context.truncated
    after = torch.where(_like(done, obs), obs, context.next_obs())
    states = query.obs[asked, b]
    parts = [(states[:-1], obs[order, b], after[order, b])]
    before = _no_previous(action, reward)
    for none, x in zip(before, (action, reward, done), strict=True):
        parts.append((none, none, x[order, b]))
    last_query = (states[-1], *(x[0] for x in before))
    names = ("obs", "previous_action", "previous_reward", "previous_done")
    batch = {
        name: torch.cat([torch.stack(part, 1).flatten(0, 1), end.unsqueeze(0)])
        for name, part, end in zip(names, parts, last_query, strict=True)
    }  # (3 T + 1, B, ...)
    if not context.all_count:  # A query after n transitions counts where there are as many.
        known = torch.arange(steps + 1, device=device).unsqueeze(1)
        batch["mask"] = known <= context.mask.sum(0)
    return batch | {"action": best[asked, b]}


def dpt_loss(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Report]:
    """The negative log-likelihood of the best actions at the queries."""
    pi, _, _ = policy(batch["obs"], previous_in(batch), empty_memory(policy, batch))
    pi = pi[::3]  # the queries
    head, mask = policy.policy_head, batch.get("mask")
    loss = expert_action_loss(head.log_prob(pi, batch["action"]), mask=mask)
    return loss, {"loss": loss, "entropy": counted_mean(head.entropy(pi), mask)}


def _like(done: Tensor, obs: Tensor) -> Tensor:
    """(T, B) with as many dimensions as observations have."""
    return done.reshape(*done.shape, *[1] * (obs.dim() - 2))


def _no_previous(action: Tensor, reward: Tensor) -> Previous:
    """Inputs of the previous step where there was none."""
    none = -1 if action.dtype == torch.int64 else 0
    ended = torch.ones_like(reward, dtype=torch.bool)
    return torch.full_like(action, none), torch.zeros_like(reward), ended
