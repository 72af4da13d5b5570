"""A family for tests: every kind of observation, action and length, in ten steps an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from dmrl_ray.config.schema import Settings
from dmrl_ray.envs.belief import BeliefVectorEnv
from dmrl_ray.tasks.distribution import TaskDistribution, make_tasks, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.tasks.spaces import Packed
from dmrl_ray.types import Array, Split, Task

LIMIT, SHORT = 10, 3
"""Steps of the longest episodes, and of the shortest."""

EPISODES = 2
"""In a trial."""

REACH = 2.0
PLACE = Box(-REACH, REACH, (2,), np.float32)
PICTURE = Box(0, 255, (8, 8, 3), np.uint8)
SEEN = {
    "vector": PLACE,
    "picture": PICTURE,
    "dict": Packed({"place": PLACE, "picture": PICTURE, "third": Discrete(3)}),
}
ACTS = {"discrete": Discrete(3), "continuous": Box(-1.0, 1.0, (2,), np.float32)}


class WalkVectorEnv(BeliefVectorEnv):
    """Walkers on a line.

    * Observation: place and time, as two numbers, a picture, or both and a third of the time.
    * Action: a step left, none or right; or two numbers whose mean is the step.
    * Reward: 1 and up to 0.04 more or less, by the distance to a goal: an episode's return is its
      length when it is rounded.
    * End: truncated after 10 steps. Where lengths vary also terminated: after 3 steps in a share of
      the episodes that is the task's, and from then on wherever the walker is left of -0.3, unless
      lengths are ``drawn`` alone.
    """

    state_fields: ClassVar[tuple[str, ...]] = (
        *("place", "goal", "next_goal", "short", "next_short", "length", "t"),
    )

    def __init__(self, num_envs: int, seen: str, acts: str, varying: bool, drawn: bool = False):
        super().__init__(num_envs, SEEN[seen], ACTS[acts])
        self.seen, self.discrete = seen, acts == "discrete"
        self.varying, self.drawn = varying, drawn
        self.place, self.goal, self.next_goal, self.short, self.next_short = np.zeros((5, num_envs))
        self.length, self.t = np.full((2, num_envs), LIMIT)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        super().set_tasks(tasks)
        self.next_goal = np.array([task.params["goal"] for task in tasks])
        self.next_short = np.array([task.params["short"] for task in tasks])

    def begin(self, env_ids: Array) -> None:
        super().begin(env_ids)
        self.place[env_ids], self.t[env_ids] = 0.0, 0
        self.goal[env_ids], self.short[env_ids] = self.next_goal[env_ids], self.next_short[env_ids]
        ends_early = self.np_random.random(len(env_ids)) < self.short[env_ids]
        self.length[env_ids] = np.where(ends_early & self.varying, SHORT, LIMIT)

    def reset_belief(self, env_ids: np.ndarray) -> None:
        pass

    def observe(self) -> np.ndarray:
        place = np.stack([self.place, self.t / LIMIT], axis=1, dtype=np.float32)
        if self.seen == "vector":
            return place
        picture = np.zeros((self.num_envs, 8, 8, 3), np.uint8)
        across = np.rint((self.place + REACH) / (2 * REACH) * 7).astype(int)
        picture[self.env_ids, np.minimum(self.t, 7), across] = 255
        if self.seen == "picture":
            return picture
        parts = {"place": place, "picture": picture, "third": self.t % 3}
        return SEEN["dict"].pack(parts)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        move = actions - 1 if self.discrete else actions.mean(axis=1)
        self.place = np.clip(self.place + 0.2 * move, -REACH, REACH)
        self.t += 1
        near = np.clip(1 - np.abs(self.place - self.goal), -1, 1)
        reward = (1 + 0.04 * near).astype(np.float32)
        left = (self.place < -0.3) & (self.t >= SHORT) & (self.varying and not self.drawn)
        truncated = self.t >= LIMIT
        terminated = (left | (self.t >= self.length)) & ~truncated
        obs, infos = self.auto_reset(self.observe(), terminated | truncated)
        return obs, reward, terminated, truncated, infos

    def expert_action(self) -> np.ndarray:
        """Back to the middle, which is the best place for one who does not know the goal."""
        return self._towards(np.zeros(self.num_envs))

    def best_action(self) -> np.ndarray:
        """To the goal."""
        return self._towards(self.goal)

    def _towards(self, goal: np.ndarray) -> np.ndarray:
        way = np.clip((goal - self.place) / 0.2, -1, 1)
        if self.discrete:
            return np.rint(way).astype(np.int64) + 1
        return np.repeat(way[:, None], 2, axis=1).astype(np.float32)

    def render(self) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)


class Walk(TaskDistribution):
    """Goals, and shares of short episodes, of one's own in every split."""

    class Config(Settings):
        seen: Literal["vector", "picture", "dict"] = "vector"
        acts: Literal["discrete", "continuous"] = "discrete"
        varying: bool = False
        drawn: bool = False
        episodes: int = EPISODES

    family = "walk"
    max_episode_steps = LIMIT

    def __init__(self, config: Config):
        self.config = config
        self.fixed_length = not config.varying
        self.episodes_per_trial = config.episodes
        self.observation_space, self.action_space = SEEN[config.seen], ACTS[config.acts]

    def make_vec(self, num_envs: int) -> WalkVectorEnv:
        config = self.config
        return WalkVectorEnv(num_envs, config.seen, config.acts, config.varying, config.drawn)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        stream = split_stream(rng, split)
        params = {"goal": stream.uniform(-1, 1, n), "short": stream.uniform(0.2, 0.8, n)}
        return make_tasks(self.family, split, params)

    def reference(self, task: Task) -> Reference | None:
        """Not the true ends: two numbers that make scores."""
        both = np.array([[LIMIT - 1.0], [LIMIT + 0.4]]).repeat(self.config.episodes, 1)
        return Reference(*both)


class GymWalk(gym.Env):
    """The same walk as an ordinary environment: its tasks are attributes that are varied."""

    def __init__(self, seen: str = "vector", acts: str = "discrete", varying: bool = False):
        self.walk = WalkVectorEnv(1, seen, acts, varying)
        self.seen, self.goal, self.short = seen, 0.0, 0.5
        self.action_space = ACTS[acts]
        parts = SEEN["dict"].parts
        self.observation_space = gym.spaces.Dict(parts) if seen == "dict" else SEEN[seen]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.walk.np_random = self.np_random
        self.walk.next_goal[:], self.walk.next_short[:] = self.goal, self.short
        return self._one(self.walk.reset()[0]), {}

    def step(self, action):
        obs, reward, terminated, truncated, infos = self.walk.step(np.asarray(action)[None])
        obs = infos.get("final_obs", obs)
        return self._one(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}

    def _one(self, obs):
        if self.seen != "dict":
            return obs[0]
        space = SEEN["dict"]
        picture = np.rint(255 * space.part(obs, "picture")[0]).astype(np.uint8)
        third = int(space.part(obs, "third")[0].argmax())
        return {"place": space.part(obs, "place")[0], "picture": picture, "third": third}


class LazyWalk(Walk):
    """Walks whose limit is far beyond their ends; counts how often all columns are stepped."""

    family = "lazy_walk"
    max_episode_steps = 2000
    calls: ClassVar[int] = 0

    def make_vec(self, num_envs: int) -> WalkVectorEnv:
        env = super().make_vec(num_envs)
        step = env.step

        def counted(actions: Array) -> Any:
            LazyWalk.calls += 1
            return step(actions)

        env.step = counted  # type: ignore[method-assign]
        return env


class NoisyVectorEnv(WalkVectorEnv):
    """Rewards of 1 and noise, whatever is done, for 300 steps."""

    def begin(self, env_ids: Array) -> None:
        super().begin(env_ids)
        self.length[env_ids] = 300

    def observe(self) -> np.ndarray:
        return np.zeros((self.num_envs, 2), np.float32)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        self.t += 1
        reward = (1 + self.np_random.standard_normal(self.num_envs)).astype(np.float32)
        truncated = self.t >= self.length
        obs, infos = self.auto_reset(self.observe(), truncated)
        return obs, reward, self.all_false, truncated, infos


class NoisyWalk(Walk):
    """Nothing that one does changes what is earned."""

    family = "noisy_walk"
    max_episode_steps = 300

    def make_vec(self, num_envs: int) -> NoisyVectorEnv:
        return NoisyVectorEnv(num_envs, "vector", self.config.acts, False)


gym.register("Walk-v0", GymWalk, max_episode_steps=LIMIT)
