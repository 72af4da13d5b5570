"""Decision-pretrained transformer: the best action, foretold from a set of a task's transitions.

Source: Lee et al., "Supervised Pretraining Can Learn In-Context Reinforcement Learning", 2023
(arXiv:2306.14892), algorithm 1. A model sees transitions (s, a, r, s') of a task in any order and
number, and then a state in which it must name the best action; what it comes to do on a new task is
posterior sampling (section 5). Whoever played the transitions need not have been good.

A transition is shown as two inputs: s with nothing before it, and s' with a and r; a query as s
alone. So any encoder with memory will do, and while acting, a query leaves no trace in it. What
follows the end of an episode is not seen by who acts, so that s stands in its place. Left out: a
context that is kept as it is within an episode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.offline import Offline, open_dataset
from dmrl_ray.data_sources import DataSettings
from dmrl_ray.dataset import Dataset
from dmrl_ray.networks.base import Memory
from dmrl_ray.policy import ActorCritic, Previous
from dmrl_ray.rollout import Sampler
from dmrl_ray.tasks import TaskDistribution
from dmrl_ray.types import Rollout, Trial


class DPT(Offline):
    """Cloning of the best actions, in context."""

    class Config(Offline.Config):
        experts: DataSettings | None = None
        """Where query states and their best actions are read, of the same tasks as the contexts;
        null takes them from the end of each history in `data`."""

        newest: float = Field(default=0.2, gt=0, le=1)
        """Share of each history, its end, whose actions count as the best."""

        queries: int = Field(default=4, ge=1)
        """Contexts drawn, each with a query, from the transitions read into a column."""

    config: Config
    sees_previous = True
    memory_spans_trial = True
    _experts: Dataset | None = None
    _tasks: Sequence[str] = ()

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        if not policy.recurrent:
            raise ValueError("network.encoder: dpt needs one with memory, such as a transformer")

    @property
    def experts(self) -> Dataset:
        """Whose actions are the best."""
        if self._experts is None:
            settings = self.config.experts
            self._experts = open_dataset(self, settings) if settings else self.dataset
        return self._experts

    def read(self, rng: np.random.Generator, columns: int) -> Trial:
        """Transitions of a task in each column, and queries of the same task."""
        newest = 1.0 if self.config.experts else self.config.newest
        if not self._tasks:
            self._tasks = sorted({*self.dataset.task_names} & {*self.experts.tasks_of(newest)})
        if not self._tasks:
            raise ValueError("algorithm.experts: its tasks are none of the tasks in data")
        names = [self._tasks[i] for i in rng.integers(len(self._tasks), size=columns)]
        context = self.dataset.of_tasks(rng, names, self.num_steps)
        return [context, self.experts.of_tasks(rng, names, self.config.queries, newest=newest)]

    def batch(self, trial: Trial) -> dict[str, Tensor]:
        """`queries` sequences of each column: two inputs for each transition, and a query."""
        context, query = trial
        parts = [self._sequences(context, query, i) for i in range(self.config.queries)]
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def _sequences(self, context: Rollout, query: Rollout, number: int) -> dict[str, Tensor]:
        """Transitions in a random order, the query after a random number of them."""
        steps, columns = context.reward.shape
        device = context.reward.device
        shuffled = self.rng.permuted(np.tile(np.arange(steps)[:, None], columns), axis=0)
        drawn = self.rng.integers(steps + 1, size=columns)
        order, length = (torch.from_numpy(x).to(device) for x in (shuffled, drawn))
        b = torch.arange(columns, device=device)
        obs, action, reward = context.obs[:-1], context.action, context.reward
        done = context.terminated | context.truncated
        over = done.reshape(*done.shape, *[1] * (obs.dim() - 2))
        after = torch.where(over, obs, context.next_obs())
        obs, after, action, reward, done = (x[order, b] for x in (obs, after, action, reward, done))
        before = _nothing(action, reward)
        pairs = ((obs, after), *zip(before, (action, reward, done), strict=True))
        shown = [torch.stack(pair, 1).flatten(0, 1) for pair in pairs]  # (2 T, B, ...)
        shown = [torch.cat([x, x[:1]]) for x in shown]
        asked = (query.obs[number], *(x[0] for x in before))
        for x, value in zip(shown, asked, strict=True):
            x[2 * length, b] = value
        names = ("obs", "previous_action", "previous_reward", "previous_done")
        at = (2 * length).unsqueeze(0)
        wanted = {"at": at, "action": query.action[number].unsqueeze(0)}
        return dict(zip(names, shown, strict=True)) | wanted

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        policy, at = self.policy, batch["at"]
        pi, _, _ = policy(batch["obs"], self.previous(batch), self.empty_memory(batch))
        pi = pi[at[0], torch.arange(at.shape[1], device=at.device)].unsqueeze(0)
        head = policy.policy_head
        loss = -head.log_prob(pi, batch["action"]).mean()
        return loss, {"entropy": head.entropy(pi).mean()}

    def play(self, sampler: Sampler, num_steps: int) -> Trial:
        return [sampler.rollout(self.policy, num_steps, actor=self._act, with_value=False)]

    def _act(
        self, obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        """Take in the transition that led here, and ask; memory ends with the last observation."""
        assert previous is not None
        none = _nothing(*previous[:2])
        if reset is None:
            *kept, last = memory
            after = torch.where(
                previous[2].reshape(*previous[2].shape, *[1] * (obs.dim() - 2)), last, obs
            )
            _, _, remembered = self.policy(last, none, tuple(kept))
            _, _, remembered = self.policy(after, previous, remembered)
        else:  # All columns at once: memory spans the trial.
            remembered = self.policy.initial_memory(obs.shape[1])
        pi, features, _ = self.policy(obs, none, remembered)
        return pi, features, (*remembered, obs.clone())


def _nothing(action: Tensor, reward: Tensor) -> Previous:
    """What is shown where nothing came before."""
    none = -1 if action.dtype == torch.int64 else 0
    ended = torch.ones_like(reward, dtype=torch.bool)
    return torch.full_like(action, none), torch.zeros_like(reward), ended
