"""CartPole-v1 whose physics vary: masses, lengths and forces must be inferred from the motion.

With the default settings it agrees with gymnasium's CartPole-v1 to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium.spaces import Box, Discrete
from pydantic import field_validator

from dmrl_ray.config.schema import Settings
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv, make_tasks, split_stream
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import Array, Split, Task

STANDARD = {"gravity": 9.8, "length": 0.5, "masspole": 0.1, "force_mag": 10.0}
"""The physics of CartPole-v1; `length` is half the pole's."""

MASSCART = 1.0
TAU = 0.02  # seconds between steps
LIMITS = np.array([[2.4], [12 * 2 * math.pi / 360]])
"""The position and angle beyond which an episode terminates."""

MAX_STEPS = 500
RANDOM_RETURN = 22.25
"""The return of uniformly random actions under the standard physics; mean of 2^20 episodes,
+-0.012."""

_HIGH = np.array([4.8, np.inf, 2 * LIMITS[1, 0], np.inf], np.float32)


class CartPoleVectorEnv(TaskVectorEnv):
    """Carts with a pole.

    * Observation: (4,) position, velocity, angle, angular velocity; m, s, rad.
    * Action: 0 pushes to the left, 1 to the right.
    * Reward: 1 per step, including the one that terminates.
    * End: terminated when the pole falls or the cart leaves the track; truncated after 500 steps.
    """

    state_fields: ClassVar[tuple[str, ...]] = (
        "physics",
        "next_physics",
        "task_changed",
        "motion",
        "t",
    )

    def __init__(self, num_envs: int):
        super().__init__(num_envs, Box(-_HIGH, _HIGH, dtype=np.float32), Discrete(2))
        # Quantities along the first axis, so that every operand in `_move` is contiguous.
        self._motion = np.zeros((4, num_envs))
        self._change = np.zeros((4, num_envs))
        self._work = np.zeros((5, num_envs))
        self._outside = np.zeros((2, num_envs), np.bool_)
        self.next_physics = np.tile(list(STANDARD.values()), (num_envs, 1))
        self.physics = self.next_physics
        self.task_changed = np.zeros(num_envs, np.bool_)
        self.t = np.zeros(num_envs, np.int64)

    @property
    def motion(self) -> np.ndarray:
        """The observations in double precision, (B, 4)."""
        return self._motion.T

    @motion.setter
    def motion(self, motion: np.ndarray) -> None:
        self._motion[:] = motion.T

    @property
    def physics(self) -> np.ndarray:
        """The physics in the order of `STANDARD`, (B, 4)."""
        return self._physics

    @physics.setter
    def physics(self, physics: np.ndarray) -> None:
        self._physics = physics.copy()
        gravity, length, masspole, force = np.ascontiguousarray(physics.T)
        self._constants = (
            gravity,
            length,
            masspole,
            masspole + MASSCART,
            masspole * length,
            force,
            -force,
        )

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        self.next_physics[:] = [[task.params[name] for name in STANDARD] for task in tasks]
        self.task_changed[:] = True

    def begin(self, env_ids: np.ndarray) -> None:
        """Starts episodes near the center, with the poles nearly upright."""
        changed = env_ids[self.task_changed[env_ids]]
        if len(changed):
            self._physics[changed] = self.next_physics[changed]
            self.physics = self._physics
            self.task_changed[changed] = False
        self._motion[:, env_ids] = self.np_random.uniform(-0.05, 0.05, (len(env_ids), 4)).T
        self.t[env_ids] = 0

    def observe(self) -> np.ndarray:
        """Returns positions, velocities, angles and angular velocities (B, 4)."""
        return self._motion.T.astype(np.float32, order="C")

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Pushes every cart."""
        self._move(actions)
        np.greater(np.abs(self._motion[::2]), LIMITS, out=self._outside)
        terminated = self._outside[0] | self._outside[1]
        self.t += 1
        truncated = self.t >= MAX_STEPS
        reward = np.ones(self.num_envs, np.float32)
        obs, infos = self.auto_reset(self.observe(), terminated | truncated)
        return obs, reward, terminated, truncated, infos

    def _move(self, actions: np.ndarray) -> None:
        # Gymnasium's equations (Florian, "Correct equations for the dynamics of the cart-pole
        # system", 2007) in its order of operations, so that rounding agrees too.
        gravity, length, masspole, total_mass, pole_moment, force, reverse = self._constants
        motion, change = self._motion, self._change
        sin, cos, push, a, b = self._work
        np.sin(motion[2], out=sin)
        np.cos(motion[2], out=cos)
        np.square(motion[3], out=push)
        push *= pole_moment
        push *= sin
        push += np.where(actions, force, reverse)
        push /= total_mass
        np.square(cos, out=b)
        b *= masspole
        b /= total_mass
        np.subtract(4.0 / 3.0, b, out=b)
        b *= length
        np.multiply(gravity, sin, out=sin)
        np.multiply(cos, push, out=a)
        np.subtract(sin, a, out=a)
        np.divide(a, b, out=change[3])
        np.multiply(pole_moment, change[3], out=a)
        a *= cos
        a /= total_mass
        np.subtract(push, a, out=change[1])
        change[::2] = motion[1::2]
        change *= TAU
        motion += change

    def render(self) -> Array:
        """Draws the cart in black on its track, with its pole in brown."""
        image = np.full((40, 96, 3), 255, np.uint8)
        position, _, angle, _ = self._motion[:, 0]
        middle = 48 + 18 * position
        along = np.linspace(0.0, 40 * self._physics[0, 1], 40)
        rows = np.clip(np.rint(30 - along * math.cos(angle)), 0, 39).astype(int)
        across = np.clip(np.rint(middle + along * math.sin(angle)), 0, 95).astype(int)
        image[rows, across] = (150, 90, 40)
        image[30:35, int(np.clip(middle - 6, 0, 84)) :][:, :12] = 0
        return image


class CartPole(TaskDistribution):
    """Physics, each uniform on a range; by default a range is one value, that of `STANDARD`."""

    class Config(Settings):
        """The ranges of the physics."""

        gravity: tuple[float, float] = (9.8, 9.8)
        """Gravity in metres per square second, from and to."""

        length: tuple[float, float] = (0.5, 0.5)
        """Half the pole's length in metres, from and to."""

        masspole: tuple[float, float] = (0.1, 0.1)
        """Mass of the pole in kilograms, from and to; the cart's is 1."""

        force_mag: tuple[float, float] = (10.0, 10.0)
        """Force of a push in newtons, from and to."""

        @field_validator("*")
        @classmethod
        def _is_a_range(cls, value: tuple[float, float]) -> tuple[float, float]:
            if not 0 < value[0] <= value[1]:
                raise ValueError(f"must be two positive numbers in order, found {list(value)}")
            return value

    family = "cartpole"
    domain = "robot"
    fixed_length = False
    max_episode_steps = MAX_STEPS

    def __init__(self, config: Config):
        self.config = config
        self.observation_space = Box(-_HIGH, _HIGH, dtype=np.float32)
        self.action_space = Discrete(2)

    def make_vec(self, num_envs: int) -> CartPoleVectorEnv:
        """Returns a vector environment of carts."""
        return CartPoleVectorEnv(num_envs)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n physics of a split."""
        low, high = np.array([getattr(self.config, name) for name in STANDARD]).T
        physics = split_stream(rng, split).uniform(low, high, (n, len(STANDARD)))
        return make_tasks(self.family, split, dict(zip(STANDARD, physics.T, strict=True)))

    def reference(self, task: Task) -> Reference | None:
        """Returns the measured random return and the maximum, for the standard physics alone."""
        if any(task.params[name] != value for name, value in STANDARD.items()):
            return None
        return Reference(random=np.array([RANDOM_RETURN]), oracle=np.array([float(MAX_STEPS)]))
