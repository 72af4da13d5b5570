"""A choice that leads to one of two places, of which one pays: does the agent know the way?

The two-step task of Wang et al. 2016 (arXiv:1611.05763, sec. 3.2.1), after Daw et al. 2011, with
the reversals within a trial of Wang et al. 2018 (doi:10.1038/s41593-018-0147-8).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.types import SPLITS, Array, Reference, Split, Task

from .memory import RememberingVectorEnv

COMMON = 0.75
"""Chance that action 0 leads to the first place, and action 1 to the second."""

HIGH = 0.9
"""Chance of a reward at the better place; 1 - HIGH at the other."""


class TwoStepVectorEnv(RememberingVectorEnv):
    """Columns that choose, arrive, are paid, and choose again.

    * Observation: (3,) one-hot: the choice, the first place, the second place.
    * Action: 0 or 1 at the choice; of no effect at a place.
    * Reward: 0 for a choice; at a place 1 with its chance, else 0.
    * End: terminated after `rounds` choices, each of two steps.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("better", "next_better", "place", "t")
    memory_fields: ClassVar[tuple[str, ...]] = ("posterior",)

    def __init__(self, num_envs: int, rounds: int, reversal: float):
        super().__init__(num_envs, Box(0.0, 1.0, (3,), np.float32), Discrete(2))
        self.rounds = rounds
        self.reversal = reversal
        self.better = np.zeros((num_envs, rounds), np.int64)  # place, round by round
        self.next_better = self.better.copy()
        self.place = np.zeros(num_envs, np.int64)  # 0 the choice, 1 and 2 the places
        self.t = np.zeros(num_envs, np.int64)
        # (B, 2, 2): which place is better in the first round, and in the present one.
        self.posterior = np.tile(np.eye(2) / 2, (num_envs, 1, 1))
        self._columns = np.arange(num_envs)
        self._one_hot = np.eye(3, dtype=np.float32)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_better[:] = [task.params["better"] for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Put these columns at the first choice."""
        if self.remembers:  # What was better in the first round is so again.
            self.posterior[columns] = np.eye(2) * self.posterior[columns].sum(axis=2)[..., None]
        super().begin(columns)
        self.better[columns] = self.next_better[columns]
        self.place[columns] = 0
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """Either place may be the better one in these columns."""
        self.posterior[columns] = np.eye(2) / 2

    def observe(self) -> np.ndarray:
        """(B, 3) one-hot: the choice or a place."""
        return self._one_hot.take(self.place, axis=0)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Choose, or be paid."""
        draw, chooses = self.np_random.random(self.num_envs), self.place == 0
        better = self.better[self._columns, self.t // 2]
        chance = np.where(self.place - 1 == better, HIGH, 1 - HIGH)
        reward = (~chooses & (draw < chance)).astype(np.float32)
        if self.remembers:
            self._learn(np.flatnonzero(~chooses), reward > 0)
        arrives = 1 + np.where(draw < COMMON, actions, 1 - actions)
        self.place = np.where(chooses, arrives, 0)
        self.t += 1
        terminated = self.t >= 2 * self.rounds
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def _learn(self, columns: np.ndarray, paid: np.ndarray) -> None:
        # A reward speaks for the place, its absence for the other.
        favoured = np.where(paid[columns], self.place[columns] - 1, 2 - self.place[columns])
        likelihood = np.where(np.arange(2) == favoured[:, None], HIGH, 1 - HIGH)
        joint = self.posterior[columns] * likelihood[:, None]
        joint /= joint.sum(axis=(1, 2), keepdims=True)
        self.posterior[columns] = joint + self.reversal * (joint[..., ::-1] - joint)

    def belief(self) -> np.ndarray:
        """(B, 3) the chance that the first place is the better one in this round, the same for the
        first round, and the share of the steps done."""
        done = self.t / (2 * self.rounds)
        now, start = self.posterior.sum(axis=1)[:, 0], self.posterior.sum(axis=2)[:, 0]
        return np.stack([now, start, done], axis=1).astype(np.float32)

    def expert_action(self) -> np.ndarray:
        """(B,) the choice that commonly leads to the likelier place; 0 at a place.

        Bayes-optimal: either place tells the same about which of them is the better one.
        """
        likelier = self.posterior.sum(axis=1).argmax(axis=1)
        return np.where(self.place == 0, likelier, 0)

    def render(self) -> Array:
        """The choice below, the places above; the better one green, the agent's black."""
        image = np.full((2, 4, 3), 255, np.uint8)
        image[0, [0, 3]] = (200, 200, 200)
        current = min(int(self.t[0]) // 2, self.rounds - 1)
        image[0, 3 * self.better[0, current]] = (40, 160, 60)
        at = [(1, 1), (0, 0), (0, 3)][self.place[0]]
        image[at] = (0, 0, 0)
        return image.repeat(8, axis=0).repeat(8, axis=1)


class TwoStep(TaskDistribution):
    """Which place is better, round by round; every split has its own draws.

    Where reversals are rare the same sequences are drawn in several splits: there are two without
    any. By default nothing is held out.
    """

    class Config(Settings):
        """Length of the trials, how often the places change roles and what is held out."""

        rounds: Number = 100
        """Choices in a trial, each of two steps; one episode."""

        reversal: float = Field(default=0.025, ge=0, le=0.5)
        """Chance that the places change roles after a round; 0 as in Wang et al. 2016."""

        held_out: float = Field(default=0.0, ge=0, le=0.4)
        """Share of the sequences kept for the validation split, and as many others for the test
        split, told apart by their ids; 0 lets every split draw from all of them."""

    family = "two_step"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (3,), np.float32)
        self.action_space = Discrete(2)
        self.max_episode_steps = 2 * config.rounds
        self._references: dict[Split, Reference] = {}
        self.task_bytes = 8 * config.rounds
        if config.held_out:
            rng, parts = np.random.default_rng(0), Counter[str]()
            for _ in range(100):  # Few at a time, and no more than it takes: they may be long.
                parts.update(self._part(task) for task in self._draw(rng, 10, "train"))
                if all(parts[split] >= 10 for split in SPLITS):
                    break
            else:
                raise ValueError(
                    f"tasks.held_out: {config.rounds} rounds with reversal {config.reversal:g} are "
                    "nearly always one of too few sequences to be split; use 0, or more reversals"
                )

    def make_vec(self, num_envs: int) -> TwoStepVectorEnv:
        """A vector environment whose columns play two-step tasks."""
        return TwoStepVectorEnv(num_envs, self.config.rounds, self.config.reversal)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n sequences of the better place of a split."""
        stream = split_stream(rng, split)
        tasks = self._draw(stream, n, split)
        if not self.config.held_out:
            return tasks
        mine: list[Task] = []
        while len(mine) < n:
            mine += [task for task in tasks if self._part(task) == split]
            tasks = self._draw(stream, n, split)
        return mine[:n]

    def _draw(self, stream: np.random.Generator, n: int, split: Split) -> list[Task]:
        changes = stream.random((n, self.config.rounds)) < self.config.reversal
        changes[:, 0] = stream.random(n) < 0.5
        better = (np.cumsum(changes, axis=1) % 2).astype(np.float64)
        return make_tasks(self.family, split, {"better": better})

    def _part(self, task: Task) -> Split:
        """The split that a sequence is kept for: its id is as good as a random number."""
        at, held_out = int(task.id, 16) / 2**64, self.config.held_out
        return "validation" if at < held_out else "test" if at < 2 * held_out else "train"

    def reference(self, task: Task) -> Reference:
        """Both ends averaged over the task's split.

        The oracle knows the chances, not the places, and is Bayes-optimal where nothing is held
        out. Where something is, it does not know which sequences the split has.
        """
        if task.split not in self._references:
            rounds, reversal = self.config.rounds, self.config.reversal
            if self.config.held_out:
                drawn = self.sample(np.random.default_rng(0), 4000, task.split)
                better = np.array([task.params["better"] for task in drawn])
                oracle = filter_return(np.tile(better.T, 5), reversal)
            else:
                oracle = bayes_return(rounds, reversal)
            ends = Reference(np.array([0.5 * rounds]), np.array([oracle]))
            self._references[task.split] = ends
        return self._references[task.split]


@lru_cache(maxsize=16)
def bayes_return(rounds: int, reversal: float, trials: int = 20_000, seed: int = 0) -> float:
    """The Bayes-optimal return of a trial, over simulated posteriors; its error is about 0.02.

    Whoever chooses, a round's reward speaks with chance `HIGH` for the place that is better.
    """
    rng = np.random.default_rng(seed)
    chance = np.full(trials, 0.5)  # that the first place is the better one
    total = 0.0
    for _ in range(rounds):
        reached = 0.5 + (2 * COMMON - 1) * np.abs(chance - 0.5)  # the better place, in expectation
        total += float((1 - HIGH + (2 * HIGH - 1) * reached).mean())
        speaks = rng.random(trials) < 1 - HIGH + (2 * HIGH - 1) * chance
        chance = _after(chance, speaks, reversal)
    return total


def filter_return(better: np.ndarray, reversal: float, seed: int = 0) -> float:
    """The return of a trial by the rule that is Bayes-optimal for all sequences, on some of them.

    Args:
        better: (rounds, N) the better place, 0 or 1.
        reversal: chance that the places change roles, as the rule has it.
        seed: of the rewards.
    """
    rng = np.random.default_rng(seed)
    chance = np.full(better.shape[1], 0.5)  # that the first place is the better one
    total = 0.0
    for place in better:
        right = np.where(chance >= 0.5, 0, 1) == place
        reached = np.where(right, COMMON, 1 - COMMON)  # the better place, in expectation
        total += float((1 - HIGH + (2 * HIGH - 1) * reached).mean())
        first = rng.random(len(chance)) < np.where(place == 0, HIGH, 1 - HIGH)
        chance = _after(chance, first, reversal)
    return total


def _after(chance: np.ndarray, speaks: np.ndarray, reversal: float) -> np.ndarray:
    """The chance that the first place is better in the next round, after what speaks for it."""
    likelihood = np.where(speaks, HIGH, 1 - HIGH)
    chance = chance * likelihood / (chance * likelihood + (1 - chance) * (1 - likelihood))
    return chance + reversal * (1 - 2 * chance)


def stay_probabilities(choice: np.ndarray, place: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """(2, 2) how often a choice is repeated after a common or rare way (rows), unpaid or paid.

    An agent that knows the way repeats it after common and paid, and after rare and unpaid; one
    that does not looks at the reward alone.

    Args:
        choice: (rounds, B) actions at the choice, 0 or 1.
        place: (rounds, B) where they led, 0 or 1.
        reward: (rounds, B) what was paid there.
    """
    stays = choice[1:] == choice[:-1]
    rare, paid = choice[:-1] != place[:-1], reward[:-1] > 0
    return np.array(
        [[stays[(rare == r) & (paid == p)].mean() for p in (False, True)] for r in (False, True)]
    )
