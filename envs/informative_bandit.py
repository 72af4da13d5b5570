"""Ten arms of which one pays, and an eleventh that pays little and tells which.

The bandit with an informative arm of Wang et al. 2016 (arXiv:1611.05763, sec. 3.1.3): the agent
must give up a reward to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, drawn_from, make_tasks, split_stream
from dmrl_ray.types import SPLITS, Array, Reference, Split, Task

from .memory import RememberingVectorEnv

CANDIDATES = 10
"""Arms that may be the target; the informative arm comes after them."""

TARGET, OTHER = 5.0, 1.0
"""What the target and the other candidates pay."""

HINT: np.ndarray = np.arange(1, CANDIDATES + 1) / 10
"""(candidates,) what the informative arm pays."""


class InformativeBanditVectorEnv(RememberingVectorEnv):
    """Columns of bandits with a hidden target.

    * Observation: (1,) share of the pulls done.
    * Action: the arm to pull; 10 is the informative one.
    * Reward: 5 from the target, 1 from the nine others, (i + 1) / 10 from the informative arm if
      the target is arm i. There is no noise.
    * End: terminated after `pulls` pulls.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("target", "next_target", "t")
    memory_fields: ClassVar[tuple[str, ...]] = ("possible", "split")

    def __init__(
        self, num_envs: int, pulls: int, targets: Mapping[Split, tuple[int, ...]] | None = None
    ):
        """Targets are those of each split, from the least; all candidates by default."""
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(CANDIDATES + 1))
        self.pulls = pulls
        self.target = np.zeros(num_envs, np.int64)
        self.next_target = self.target.copy()
        self.t = np.zeros(num_envs, np.int64)
        targets = targets or dict.fromkeys(SPLITS, tuple(range(CANDIDATES)))
        self._plans = [(pulls, targets[split]) for split in SPLITS]
        self._targets = np.zeros((len(SPLITS), CANDIDATES), np.bool_)
        for i, split in enumerate(SPLITS):
            self._targets[i, list(targets[split])] = True
        self.split = np.zeros(num_envs, np.int64)  # of the tasks last set, into `SPLITS`
        self.possible = self._targets[self.split]

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        super().set_tasks(tasks)
        self.next_target[:] = [task.params["target"] for task in tasks]
        self.split = np.array([SPLITS.index(task.split) for task in tasks])

    def begin(self, columns: np.ndarray) -> None:
        """Put the pulls of these columns back to none."""
        super().begin(columns)
        self.target[columns] = self.next_target[columns]
        self.t[columns] = 0

    def forget(self, columns: np.ndarray) -> None:
        """The target of these columns may be any of their split."""
        self.possible[columns] = self._targets[self.split[columns]]

    def observe(self) -> np.ndarray:
        """(B, 1) share of the pulls done."""
        return (self.t / self.pulls).astype(np.float32)[:, None]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Pull one arm in every column."""
        met, asked = actions == self.target, actions == CANDIDATES
        reward = np.where(asked, HINT[self.target], np.where(met, TARGET, OTHER)).astype(np.float32)
        if self.remembers:
            arms, told = np.arange(CANDIDATES), (met | asked)[:, None]
            self.possible &= np.where(told, self.target[:, None] == arms, actions[:, None] != arms)
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def belief(self) -> np.ndarray:
        """(B, 11) the chance of each candidate to be the target, and the share of pulls done."""
        chance = self.possible / self.possible.sum(axis=1, keepdims=True)
        return np.concatenate([chance, self.observe()], axis=1, dtype=np.float32)

    @cached_property
    def _asks(self) -> np.ndarray:
        return np.array([plan(*planned)[1] for planned in self._plans])

    def expert_action(self) -> np.ndarray:
        """(B,) the target if it is known, else the informative arm or the first candidate left."""
        count = self.possible.sum(axis=1)
        asks = self._asks[self.split, self.pulls - self.t, count]
        return np.where(asks, CANDIDATES, self.possible.argmax(axis=1))

    def render(self) -> Array:
        """One bar per arm, as high as what it pays."""
        pays = np.where(np.arange(CANDIDATES + 1) == self.target[0], TARGET, OTHER)
        pays[CANDIDATES] = HINT[self.target[0]]
        height = np.arange(32, 0, -1)[:, None] <= 32 / TARGET * np.repeat(pays, 8)
        return np.where(height[..., None], [70, 130, 180], 255).astype(np.uint8)


class InformativeBandit(TaskDistribution):
    """Targets, uniform over ten arms: what is learned is to ask first.

    By default every split draws from all of them, as in the paper. `held_out` keeps targets for
    the other splits; a belief then is one over the targets of the task's split.
    """

    class Config(Settings):
        """Length of the trials and what is held out."""

        pulls: Number = 5
        """Pulls in a trial; one episode."""

        held_out: int = Field(default=0, ge=0, le=4)
        """Targets kept for the validation split, and as many others for the test split; 0 lets
        every split draw from all ten."""

    family = "informative_bandit"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(CANDIDATES + 1)
        self.max_episode_steps = config.pulls
        self._targets = {
            split: tuple(drawn_from(CANDIDATES, config.held_out, split).tolist())
            for split in SPLITS
        }

    def make_vec(self, num_envs: int) -> InformativeBanditVectorEnv:
        """A vector environment whose columns play bandits."""
        return InformativeBanditVectorEnv(num_envs, self.config.pulls, self._targets)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n targets of a split."""
        targets = np.array(self._targets[split])
        target = targets[split_stream(rng, split).integers(len(targets), size=n)]
        return make_tasks(self.family, split, {"target": target.astype(np.float64)})

    def reference(self, task: Task) -> Reference:
        """Both ends averaged over the targets of the task's split.

        The oracle does not know the target, but which targets the split has, and is Bayes-optimal
        on their average.
        """
        pulls, targets = self.config.pulls, self._targets[task.split]
        random = random_return(pulls, targets)
        return Reference(np.array([random]), np.array([plan(pulls, targets)[0]]))


def random_return(pulls: int, targets: tuple[int, ...]) -> float:
    """Expected return of uniformly random pulls, averaged over the targets."""
    hint = float(HINT[list(targets)].mean())
    return pulls * (TARGET + (CANDIDATES - 1) * OTHER + hint) / (CANDIDATES + 1)


@cache
def plan(pulls: int, targets: tuple[int, ...]) -> tuple[float, tuple[tuple[bool, ...], ...]]:
    """The Bayes-optimal return of a trial, and where to ask, by pulls left and candidates left.

    Guesses go from the first target on: a miss pays the same whichever it is, and the informative
    arm pays more if those left are later ones. So what is left is always the last of the targets.

    Args:
        pulls: in a trial.
        targets: all that are possible at first, from the least.
    """
    value = np.zeros((pulls + 1, CANDIDATES + 1))
    asks = np.zeros(value.shape, np.bool_)
    for left in range(1, pulls + 1):
        value[left, 1] = TARGET * left
        for count in range(2, len(targets) + 1):
            ask = HINT[list(targets[-count:])].mean() + TARGET * (left - 1)
            miss = OTHER + value[left - 1, count - 1]
            guess = (TARGET * left + (count - 1) * miss) / count
            value[left, count], asks[left, count] = max(ask, guess), ask > guess
    return float(value[pulls, len(targets)]), tuple(map(tuple, asks.tolist()))
