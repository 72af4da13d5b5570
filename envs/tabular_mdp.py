"""Random tabular MDPs with unknown transitions and rewards.

The setting of RL^2's table 2 (Duan et al. 2016, arXiv:1611.02779).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete

from dmrl_ray.config.schema import Number, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import Array, Split, Task

from .belief import BeliefVectorEnv
from .tabular_oracle import ACTIONS, HORIZON, STATES, optimistic_action, plan, random_return


class TabularMDPVectorEnv(BeliefVectorEnv):
    """MDPs that start in state 0.

    * Observation: (10,) the state, one-hot.
    * Action: one of 5.
    * Reward: the mean for the state and action plus standard normal noise.
    * End: terminated after 10 steps; the horizon is part of the problem.
    """

    state_fields: ClassVar[tuple[str, ...]] = (
        "cumulative",
        "reward_mean",
        "next_cumulative",
        "next_reward_mean",
        "params_changed",
        "state",
        "t",
    )
    belief_fields: ClassVar[tuple[str, ...]] = ("transition_count", "reward_sum", "trial_t")

    def __init__(self, num_envs: int, episodes: Number = 1):
        super().__init__(num_envs, Box(0.0, 1.0, (STATES,), np.float32), Discrete(ACTIONS))
        self.max_trial_steps = episodes * HORIZON
        # P(next state <= i) for all i but the last, where it is 1; one row per state and action.
        uniform = np.arange(1, STATES) / STATES
        self.cumulative = np.tile(uniform.astype(np.float32), (num_envs, STATES * ACTIONS, 1))
        self.reward_mean = np.zeros((num_envs, STATES * ACTIONS))
        self.next_cumulative = self.cumulative.copy()
        self.next_reward_mean = self.reward_mean.copy()
        self.params_changed = np.zeros(num_envs, np.bool_)
        self.state = np.zeros(num_envs, np.int64)
        self.t = np.zeros(num_envs, np.int64)
        self.transition_count = np.zeros((num_envs, STATES * ACTIONS, STATES), np.float32)
        self.reward_sum = np.zeros((num_envs, STATES * ACTIONS), np.float32)
        self.trial_t = np.zeros(num_envs, np.int64)
        self._one_hot = np.eye(STATES, dtype=np.float32)
        self._ones = np.ones(STATES - 1, np.float32)
        self._first_row = np.arange(num_envs) * STATES * ACTIONS

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        super().set_tasks(tasks)
        shape = self.cumulative.shape
        transition = np.array([task.params["transition"] for task in tasks])
        np.cumsum(transition[..., :-1].reshape(shape), axis=-1, out=self.next_cumulative)
        reward_mean = np.array([task.params["reward_mean"] for task in tasks])
        self.next_reward_mean[:] = reward_mean.reshape(shape[:2])
        self.params_changed[:] = True

    def begin(self, env_ids: np.ndarray) -> None:
        """Starts episodes in state 0."""
        super().begin(env_ids)
        changed = env_ids[self.params_changed[env_ids]]
        if len(changed):
            self.cumulative[changed] = self.next_cumulative[changed]
            self.reward_mean[changed] = self.next_reward_mean[changed]
            self.params_changed[changed] = False
        self.state[env_ids] = 0
        self.t[env_ids] = 0

    def reset_belief(self, env_ids: np.ndarray) -> None:
        """Sets the counts and sums to zero."""
        self.transition_count[env_ids] = 0.0
        self.reward_sum[env_ids] = 0.0
        self.trial_t[env_ids] = 0

    def observe(self) -> np.ndarray:
        """Returns one-hot states (B, 10)."""
        return self._one_hot.take(self.state, axis=0)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Samples one transition of every environment."""
        pair = self.state * ACTIONS + actions
        row = self._first_row + pair
        noise = self.np_random.standard_normal(self.num_envs)
        reward = (self.reward_mean.ravel().take(row) + noise).astype(np.float32)
        cumulative = self.cumulative.reshape(-1, STATES - 1).take(row, axis=0)
        uniform = self.np_random.random((self.num_envs, 1), dtype=np.float32)
        # A product counts the passed thresholds three times as fast as a sum of booleans.
        passed = (uniform >= cumulative).astype(np.float32) @ self._ones
        self.state = passed.astype(np.int64)
        if self.tracks_belief:
            self.transition_count[self.env_ids, pair, self.state] += 1
            self.reward_sum[self.env_ids, pair] += reward
            self.trial_t += 1
        self.t += 1
        terminated = self.t >= HORIZON
        obs, infos = self.auto_reset(self.observe(), terminated)
        return obs, reward, terminated, np.zeros(self.num_envs, np.bool_), infos

    def belief(self) -> np.ndarray:
        """Returns posterior means of transitions and rewards, log-scaled visits, time, (B, 601)."""
        visits = self.transition_count.sum(axis=-1)
        transition = (self.transition_count + 1) / (visits + STATES)[..., None]
        reward_mean = (self.reward_sum + 1) / (visits + 1)
        count = np.log1p(visits) / np.log1p(self.max_trial_steps)
        done = (self.trial_t / self.max_trial_steps)[:, None]
        parts = [transition.reshape(self.num_envs, -1), reward_mean, count, done]
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def expert_action(self) -> np.ndarray:
        """Returns the actions of `optimistic_action` (B,).

        It is the best known policy without access to the MDP; the Bayes-optimal one is intractable.
        """
        steps_left = np.maximum(self.max_trial_steps - self.trial_t, HORIZON - self.t)
        return optimistic_action(
            self.transition_count, self.reward_sum, self.state, self.t, steps_left
        )

    def render(self) -> Array:
        """Draws mean rewards by state (across) and action, red to green; the state is framed."""
        mean = np.clip(self.reward_mean[0].reshape(STATES, ACTIONS).T / 4 + 0.25, 0, 1)
        image = np.stack([255 * (1 - mean), 255 * mean, np.full_like(mean, 60)], axis=-1)
        image = image.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
        left = 8 * int(self.state[0])
        image[:, [left, left + 7]] = 255
        return image


class TabularMDP(TaskDistribution):
    """Transitions from a flat Dirichlet, mean rewards from N(1, 1), sampled for each split."""

    class Config(Settings):
        """The length of trials."""

        episodes: Number = 10
        """The number of episodes in a trial (n)."""

    family = "tabular_mdp"

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(0.0, 1.0, (STATES,), np.float32)
        self.action_space = Discrete(ACTIONS)
        self.max_episode_steps = HORIZON
        self.episodes_per_trial = config.episodes

    def make_vec(self, num_envs: int) -> TabularMDPVectorEnv:
        """Returns a vector environment of MDPs."""
        return TabularMDPVectorEnv(num_envs, self.config.episodes)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n MDPs of a split."""
        stream = split_stream(rng, split)
        reward_mean = stream.normal(1.0, 1.0, (n, STATES, ACTIONS))
        transition = stream.standard_exponential((n, STATES, ACTIONS, STATES), dtype=np.float32)
        transition /= transition.sum(axis=-1, keepdims=True)
        return make_tasks(
            self.family, split, {"transition": transition, "reward_mean": reward_mean}
        )

    def reference(self, task: Task) -> Reference:
        """Returns the random return and that of an oracle that knows the MDP."""
        transition = np.asarray(task.params["transition"])
        reward_mean = np.asarray(task.params["reward_mean"])
        episodes = self.config.episodes
        return Reference(
            random=np.full(episodes, random_return(transition, reward_mean)),
            oracle=np.full(episodes, plan(transition, reward_mean)[1][0]),
        )


def psrl_return(episodes: int, trials: int, rng: np.random.Generator) -> np.ndarray:
    """Simulates posterior sampling, which plans once per episode; returns the returns (trials,).

    Its prior is the true one: Dirichlet(1) transitions, N(1, 1) mean rewards, unit noise.
    Source: Osband et al., "(More) efficient reinforcement learning via posterior sampling", 2013.
    """
    distribution = TabularMDP(TabularMDP.Config(episodes=episodes))
    env = distribution.make_vec(trials)
    env.np_random = rng
    env.set_tasks(distribution.sample(rng, trials, "test"))
    env.reset()
    alpha = np.ones((trials, STATES, ACTIONS, STATES))
    reward_sum = np.ones((trials, STATES, ACTIONS))
    total = np.zeros(trials)
    rows = np.arange(trials)
    for _ in range(episodes):
        count = alpha.sum(axis=-1) - STATES + 1  # the prior counts as one reward of 1
        sampled_mean = reward_sum / count + rng.standard_normal(count.shape) / np.sqrt(count)
        transition = rng.standard_gamma(alpha)
        transition /= transition.sum(axis=-1, keepdims=True)
        policy, _ = plan(transition, sampled_mean)
        for t in range(HORIZON):
            state = env.state.copy()
            action = policy[t, rows, state]
            obs, reward, terminated, _, infos = env.step(action)
            next_state = (infos["final_obs"] if terminated[0] else obs).argmax(axis=1)
            alpha[rows, state, action, next_state] += 1
            reward_sum[rows, state, action] += reward
            total += reward
    return total
