"""The two-step task: does an agent use the transition model, or only repeat rewarded choices?

A choice in the first stage leads to one of two second-stage states, of which one is rewarded more
often. The task of Wang et al. 2016 (arXiv:1611.05763, sec. 3.2.1), after Daw et al. 2011, with
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
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import SPLITS, Array, Split, Task

from .belief import BeliefVectorEnv

COMMON = 0.75
"""The probability of the common transition: of action 0 to second-stage state 0, of 1 to 1."""

HIGH = 0.9
"""The reward probability in the better second-stage state; 1 - HIGH in the other."""


class TwoStepVectorEnv(BeliefVectorEnv):
    """Two-step tasks.

    * Observation: (3,) one-hot: the first stage, either of the two second-stage states.
    * Action: 0 or 1 in the first stage; no effect in the second.
    * Reward: 0 in the first stage; in the second 1 with the state's reward probability, else 0.
    * End: terminated after `rounds` choices, each of two steps.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("better", "next_better", "state", "t")
    belief_fields: ClassVar[tuple[str, ...]] = ("posterior",)

    def __init__(self, num_envs: int, rounds: int, reversal: float):
        super().__init__(num_envs, Box(0.0, 1.0, (3,), np.float32), Discrete(2))
        self.rounds = rounds
        self.reversal = reversal
        self.better = np.zeros((num_envs, rounds), np.int64)  # second-stage state in each round
        self.next_better = self.better.copy()
        self.state = np.zeros(num_envs, np.int64)  # 0 first stage, 1 and 2 second stage
        self.t = np.zeros(num_envs, np.int64)
        # (B, 2, 2), joint over which state is better in the first round and in the current one.
        self.posterior = np.tile(np.eye(2) / 2, (num_envs, 1, 1))
        self._one_hot = np.eye(3, dtype=np.float32)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        self.next_better[:] = [task.params["better"] for task in tasks]

    def begin(self, env_ids: np.ndarray) -> None:
        """Starts episodes at the first choice."""
        if self.tracks_belief:  # The state that was better in the first round is so again.
            self.posterior[env_ids] = np.eye(2) * self.posterior[env_ids].sum(axis=2)[..., None]
        super().begin(env_ids)
        self.better[env_ids] = self.next_better[env_ids]
        self.state[env_ids] = 0
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets both second-stage states to the same probability of being better."""
        self.posterior[env_ids] = np.eye(2) / 2

    def observe(self) -> np.ndarray:
        """Returns one-hot states (B, 3)."""
        return self._one_hot.take(self.state, axis=0)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Makes a choice in the first stage, or samples a reward in the second."""
        uniform, first_stage = self.np_random.random(self.num_envs), self.state == 0
        better = self.better[self.env_ids, self.t // 2]
        reward_prob = np.where(self.state - 1 == better, HIGH, 1 - HIGH)
        reward = (~first_stage & (uniform < reward_prob)).astype(np.float32)
        if self.tracks_belief:
            self._update_belief(np.flatnonzero(~first_stage), reward > 0)
        second_state = 1 + np.where(uniform < COMMON, actions, 1 - actions)
        self.state = np.where(first_stage, second_state, 0)
        self.t += 1
        terminated = self.t >= 2 * self.rounds
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def _update_belief(self, env_ids: np.ndarray, rewarded: np.ndarray) -> None:
        # A reward is evidence for the state, its absence for the other one.
        state = self.state[env_ids]
        favored = np.where(rewarded[env_ids], state - 1, 2 - state)
        likelihood = np.where(np.arange(2) == favored[:, None], HIGH, 1 - HIGH)
        joint = self.posterior[env_ids] * likelihood[:, None]
        joint /= joint.sum(axis=(1, 2), keepdims=True)
        self.posterior[env_ids] = joint + self.reversal * (joint[..., ::-1] - joint)

    def belief(self) -> np.ndarray:
        """Returns the probabilities that state 0 is better now and in round 0, and time, (B, 3)."""
        done = self.t / (2 * self.rounds)
        now, start = self.posterior.sum(axis=1)[:, 0], self.posterior.sum(axis=2)[:, 0]
        return np.stack([now, start, done], axis=1).astype(np.float32)

    def expert_action(self) -> np.ndarray:
        """Returns the choices (B,) whose common transition leads to the state more likely better.

        Bayes-optimal, as both states are equally informative. In the second stage it is 0.
        """
        choice = self.posterior.sum(axis=1).argmax(axis=1)
        return np.where(self.state == 0, choice, 0)

    def render(self) -> Array:
        """Draws the second stage above the first; the better state green, the agent's black."""
        image = np.full((2, 4, 3), 255, np.uint8)
        image[0, [0, 3]] = (200, 200, 200)
        current = min(int(self.t[0]) // 2, self.rounds - 1)
        image[0, 3 * self.better[0, current]] = (40, 160, 60)
        position = [(1, 1), (0, 0), (0, 3)][self.state[0]]
        image[position] = (0, 0, 0)
        return image.repeat(8, axis=0).repeat(8, axis=1)


class TwoStep(TaskDistribution):
    """Sequences of the better second-stage state, sampled separately for each split.

    Where reversals are rare, splits share sequences: there are only two without a reversal. By
    default none is held out.
    """

    class Config(Settings):
        """The length of trials, the probability of reversals and the held-out sequences."""

        rounds: Number = 100
        """The number of choices in a trial, each of two steps; a trial is one episode."""

        reversal: float = Field(default=0.025, ge=0, le=0.5)
        """The probability of a reversal of the two states after a round; 0 in Wang et al. 2016."""

        held_out: float = Field(default=0.0, ge=0, le=0.4)
        """The fraction of sequences held out for validation, and as many others for test, by the
        hash of their ids; with 0 splits share all sequences."""

    family = "two_step"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (3,), np.float32)
        self.action_space = Discrete(2)
        self.max_episode_steps = 2 * config.rounds
        self._references: dict[Split, Reference] = {}
        self.task_bytes = 8 * config.rounds
        if config.held_out:
            rng, sizes = np.random.default_rng(0), Counter[str]()
            for _ in range(100):  # Few at a time, as sequences may be long.
                sizes.update(self._split_of(task) for task in self._sample_any(rng, 10, "train"))
                if all(sizes[split] >= 10 for split in SPLITS):
                    break
            else:
                raise ValueError(
                    f"tasks.held_out: {config.rounds} rounds with reversal {config.reversal:g} "
                    "have too few sequences to be split; use 0, or more reversals"
                )

    def make_vec(self, num_envs: int) -> TwoStepVectorEnv:
        """Returns a vector environment of two-step tasks."""
        return TwoStepVectorEnv(num_envs, self.config.rounds, self.config.reversal)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n sequences of a split."""
        stream = split_stream(rng, split)
        tasks = self._sample_any(stream, n, split)
        if not self.config.held_out:
            return tasks
        of_split: list[Task] = []
        while len(of_split) < n:
            of_split += [task for task in tasks if self._split_of(task) == split]
            tasks = self._sample_any(stream, n, split)
        return of_split[:n]

    def _sample_any(self, stream: np.random.Generator, n: int, split: Split) -> list[Task]:
        changes = stream.random((n, self.config.rounds)) < self.config.reversal
        changes[:, 0] = stream.random(n) < 0.5
        better = (np.cumsum(changes, axis=1) % 2).astype(np.float64)
        return make_tasks(self.family, split, {"better": better})

    def _split_of(self, task: Task) -> Split:
        """Returns the split of a sequence, by its id as a uniform random number."""
        uniform, held_out = int(task.id, 16) / 2**64, self.config.held_out
        return "validation" if uniform < held_out else "test" if uniform < 2 * held_out else "train"

    def reference(self, task: Task) -> Reference:
        """Returns the reference returns averaged over the task's split.

        The oracle knows all probabilities but not the sequence. It is Bayes-optimal where nothing
        is held out; otherwise it does not know which sequences the split has.
        """
        if task.split not in self._references:
            rounds, reversal = self.config.rounds, self.config.reversal
            if self.config.held_out:
                sampled = self.sample(np.random.default_rng(0), 4000, task.split)
                better = np.array([task.params["better"] for task in sampled])
                oracle = filter_return(np.tile(better.T, 5), reversal)
            else:
                oracle = bayes_return(rounds, reversal)
            reference = Reference(np.array([0.5 * rounds]), np.array([oracle]))
            self._references[task.split] = reference
        return self._references[task.split]


@lru_cache(maxsize=16)
def bayes_return(rounds: int, reversal: float, trials: int = 20_000, seed: int = 0) -> float:
    """Estimates the Bayes-optimal return by simulated posteriors, with an error of about 0.02.

    Whatever the choice, a round is evidence for the better state with probability `HIGH`.
    """
    rng = np.random.default_rng(seed)
    prob = np.full(trials, 0.5)  # that state 0 is better
    total = 0.0
    for _ in range(rounds):
        reached = 0.5 + (2 * COMMON - 1) * np.abs(prob - 0.5)  # P(better state)
        total += float((1 - HIGH + (2 * HIGH - 1) * reached).mean())
        evidence = rng.random(trials) < 1 - HIGH + (2 * HIGH - 1) * prob
        prob = _posterior(prob, evidence, reversal)
    return total


def filter_return(better: np.ndarray, reversal: float, seed: int = 0) -> float:
    """Estimates the return, on some sequences, of the policy that is Bayes-optimal over all.

    Args:
        better: (rounds, N) the better state, 0 or 1.
        reversal: the probability of a reversal that the policy assumes.
        seed: the seed of the rewards.
    """
    rng = np.random.default_rng(seed)
    prob = np.full(better.shape[1], 0.5)  # that state 0 is better
    total = 0.0
    for state in better:
        correct = np.where(prob >= 0.5, 0, 1) == state
        reached = np.where(correct, COMMON, 1 - COMMON)  # P(better state)
        total += float((1 - HIGH + (2 * HIGH - 1) * reached).mean())
        evidence = rng.random(len(prob)) < np.where(state == 0, HIGH, 1 - HIGH)
        prob = _posterior(prob, evidence, reversal)
    return total


def _posterior(prob: np.ndarray, evidence: np.ndarray, reversal: float) -> np.ndarray:
    """Returns the probability that state 0 is better in the next round.

    Args:
        prob: (N,) the same for this round.
        evidence: (N,) bool, the outcome is evidence for state 0.
        reversal: the probability of a reversal.
    """
    likelihood = np.where(evidence, HIGH, 1 - HIGH)
    prob = prob * likelihood / (prob * likelihood + (1 - prob) * (1 - likelihood))
    return prob + reversal * (1 - 2 * prob)


def stay_probabilities(choice: np.ndarray, state: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Returns how often a choice is repeated, by transition (common, rare) and reward (0, 1).

    A model-based agent repeats a choice that was rewarded after a common transition or unrewarded
    after a rare one; a model-free agent responds to the reward alone.

    Args:
        choice: (rounds, B) actions in the first stage, 0 or 1.
        state: (rounds, B) second-stage states, 0 or 1.
        reward: (rounds, B) rewards in the second stage.

    Returns:
        (2, 2) frequencies.
    """
    stays = choice[1:] == choice[:-1]
    rare, rewarded = choice[:-1] != state[:-1], reward[:-1] > 0
    return np.array(
        [
            [stays[(rare == r) & (rewarded == w)].mean() for w in (False, True)]
            for r in (False, True)
        ]
    )
