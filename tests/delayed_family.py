"""A family whose steps take a random time that no seed governs: answers come in any order."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

from dmrl_ray.envs.cartpole import CartPole, CartPoleVectorEnv


class DelayedVectorEnv(CartPoleVectorEnv):
    def step(self, actions: np.ndarray) -> Any:
        if random.random() < 0.1:
            time.sleep(random.random() * 0.02)
        return super().step(actions)


class DelayedCartPole(CartPole):
    family = "delayed_cartpole"

    def make_vec(self, num_envs: int) -> DelayedVectorEnv:
        return DelayedVectorEnv(num_envs)
