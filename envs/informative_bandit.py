"""Ten arms, one of them the target, and an eleventh whose small reward identifies the target.

The bandit with an informative arm of Wang et al. 2016 (arXiv:1611.05763, sec. 3.1.3): the agent
must forgo immediate reward for information.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import Field

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_indices, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import SPLITS, Array, Split, Task

from .belief import BeliefVectorEnv

CANDIDATES = 10
"""The number of arms that may be the target; the informative arm follows them."""

TARGET_REWARD, OTHER_REWARD = 5.0, 1.0

INFORMATIVE_REWARD: np.ndarray = np.arange(1, CANDIDATES + 1) / 10
"""(candidates,) the reward of the informative arm for each target."""


class InformativeBanditVectorEnv(BeliefVectorEnv):
    """Bandits with a hidden target arm.

    * Observation: (1,) fraction of the pulls done.
    * Action: the arm to pull; 10 is the informative one.
    * Reward: 5 for the target, 1 for the nine others, (i + 1) / 10 for the informative arm if the
      target is arm i. Rewards are deterministic.
    * End: terminated after `pulls` pulls.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("target", "next_target", "t")
    belief_fields: ClassVar[tuple[str, ...]] = ("possible", "split")

    def __init__(
        self, num_envs: int, pulls: int, targets: Mapping[Split, tuple[int, ...]] | None = None
    ):
        """`targets` are the targets of each split in ascending order, by default all candidates."""
        super().__init__(num_envs, Box(0.0, 1.0, (1,), np.float32), Discrete(CANDIDATES + 1))
        self.pulls = pulls
        self.target = np.zeros(num_envs, np.int64)
        self.next_target = self.target.copy()
        self.t = np.zeros(num_envs, np.int64)
        targets = targets or dict.fromkeys(SPLITS, tuple(range(CANDIDATES)))
        self._plan_arguments = [(pulls, targets[split]) for split in SPLITS]
        self._targets = np.zeros((len(SPLITS), CANDIDATES), np.bool_)
        for i, split in enumerate(SPLITS):
            self._targets[i, list(targets[split])] = True
        self.split = np.zeros(num_envs, np.int64)  # of the latest tasks, as indices into `SPLITS`
        self.possible = self._targets[self.split]

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        self.next_target[:] = [task.params["target"] for task in tasks]
        self.split = np.array([SPLITS.index(task.split) for task in tasks])

    def begin(self, env_ids: np.ndarray) -> None:
        """Starts trials at their first pull."""
        super().begin(env_ids)
        self.target[env_ids] = self.next_target[env_ids]
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets all targets of the tasks' splits to possible."""
        self.possible[env_ids] = self._targets[self.split[env_ids]]

    def observe(self) -> np.ndarray:
        """Returns the fractions of pulls done (B, 1)."""
        return (self.t / self.pulls).astype(np.float32)[:, None]

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Pulls one arm in every environment."""
        hit, informative = actions == self.target, actions == CANDIDATES
        reward = np.where(hit, TARGET_REWARD, OTHER_REWARD)
        reward = np.where(informative, INFORMATIVE_REWARD[self.target], reward).astype(np.float32)
        if self.tracks_belief:
            arms, revealed = np.arange(CANDIDATES), (hit | informative)[:, None]
            is_target, not_pulled = self.target[:, None] == arms, actions[:, None] != arms
            self.possible &= np.where(revealed, is_target, not_pulled)
        self.t += 1
        terminated = self.t >= self.pulls
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def belief(self) -> np.ndarray:
        """Returns each candidate's probability of being the target, and time, (B, 11)."""
        prob = self.possible / self.possible.sum(axis=1, keepdims=True)
        return np.concatenate([prob, self.observe()], axis=1, dtype=np.float32)

    @cached_property
    def _explore(self) -> np.ndarray:
        return np.array([plan(*arguments)[1] for arguments in self._plan_arguments])

    def expert_action(self) -> np.ndarray:
        """Returns the actions of `plan` (B,): the informative arm or the first possible target."""
        count = self.possible.sum(axis=1)
        explore = self._explore[self.split, self.pulls - self.t, count]
        return np.where(explore, CANDIDATES, self.possible.argmax(axis=1))

    def render(self) -> Array:
        """Draws one bar per arm, as high as its reward."""
        reward = np.where(np.arange(CANDIDATES + 1) == self.target[0], TARGET_REWARD, OTHER_REWARD)
        reward[CANDIDATES] = INFORMATIVE_REWARD[self.target[0]]
        height = np.arange(32, 0, -1)[:, None] <= 32 / TARGET_REWARD * np.repeat(reward, 8)
        return np.where(height[..., None], [70, 130, 180], 255).astype(np.uint8)


class InformativeBandit(TaskDistribution):
    """Targets, uniform over ten arms: the agent learns to pull the informative arm first.

    By default all splits share all targets, as in the paper. `held_out` reserves targets for the
    other splits; a belief is then a distribution over the targets of the task's split.
    """

    class Config(Settings):
        """The length of trials and the held-out targets."""

        pulls: Number = 5
        """The number of pulls in a trial, which is one episode."""

        held_out: int = Field(default=0, ge=0, le=4)
        """The number of targets held out for validation, and as many others for test; with 0 all
        splits share all ten."""

    family = "informative_bandit"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(CANDIDATES + 1)
        self.max_episode_steps = config.pulls
        self._targets = {
            split: tuple(split_indices(CANDIDATES, config.held_out, split).tolist())
            for split in SPLITS
        }

    def make_vec(self, num_envs: int) -> InformativeBanditVectorEnv:
        """Returns a vector environment of bandits."""
        return InformativeBanditVectorEnv(num_envs, self.config.pulls, self._targets)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n targets of a split."""
        targets = np.array(self._targets[split])
        target = targets[split_stream(rng, split).integers(len(targets), size=n)]
        return make_tasks(self.family, split, {"target": target.astype(np.float64)})

    def reference(self, task: Task) -> Reference:
        """Returns the reference returns averaged over the targets of the task's split.

        The oracle knows the split's targets but not which is the task's: it is Bayes-optimal.
        """
        pulls, targets = self.config.pulls, self._targets[task.split]
        random = random_return(pulls, targets)
        return Reference(np.array([random]), np.array([plan(pulls, targets)[0]]))


def random_return(pulls: int, targets: tuple[int, ...]) -> float:
    """Returns the expected return of uniformly random pulls, averaged over the targets."""
    informative = float(INFORMATIVE_REWARD[list(targets)].mean())
    total = TARGET_REWARD + (CANDIDATES - 1) * OTHER_REWARD + informative
    return pulls * total / (CANDIDATES + 1)


@cache
def plan(pulls: int, targets: tuple[int, ...]) -> tuple[float, tuple[tuple[bool, ...], ...]]:
    """Computes the Bayes-optimal policy of a trial.

    Guesses are made in ascending order: all misses have the same reward, and the informative arm's
    is higher where the remaining targets are later ones. The remaining targets are thus always the
    last ones.

    Args:
        pulls: the number of pulls in a trial.
        targets: the possible targets in ascending order.

    Returns:
        The expected return, and whether to pull the informative arm, by the number of pulls left
        and of targets left.
    """
    value = np.zeros((pulls + 1, CANDIDATES + 1))
    explore = np.zeros(value.shape, np.bool_)
    for left in range(1, pulls + 1):
        value[left, 1] = TARGET_REWARD * left
        for count in range(2, len(targets) + 1):
            informed = INFORMATIVE_REWARD[list(targets[-count:])].mean()
            informed += TARGET_REWARD * (left - 1)
            miss = OTHER_REWARD + value[left - 1, count - 1]
            guess = (TARGET_REWARD * left + (count - 1) * miss) / count
            value[left, count], explore[left, count] = max(informed, guess), informed > guess
    return float(value[pulls, len(targets)]), tuple(map(tuple, explore.tolist()))
