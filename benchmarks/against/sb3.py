"""Stable-Baselines3's PPO, and sb3-contrib's RecurrentPPO for tasks with memory.

CartPole is gymnasium's, in a sequential vector environment as by default; a bandit is our vector
environment, so that only the library is compared. One process, one thread of PyTorch: more are
slower on small networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Space

from benchmarks.against.match import Clock, Match

NEEDS = ("stable_baselines3", "sb3_contrib")


def train(match: Match) -> Clock:
    """Trains until the clock is over."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    window = match.target[1]

    class Watch(BaseCallback):
        def _on_training_start(self) -> None:
            self.clock = Clock(match)

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps:
                returns = [episode["r"] for episode in self.model.ep_info_buffer or ()]
                newest = sum(returns) / len(returns) if len(returns) == window else None
                if self.clock.update(self.num_timesteps, newest):
                    raise StopIteration

    kind, policy, more = PPO, "MlpPolicy", {}
    if match.memory:
        kind, policy = RecurrentPPO, "MlpLstmPolicy"
        more = {"lstm_hidden_size": match.memory, "shared_lstm": True, "enable_critic_lstm": False}
        env: Any = vector_env(match)
    else:
        env = make_vec_env("CartPole-v1", match.num_envs, seed=0)
    activation = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[match.activation]
    model = kind(
        policy,
        env,
        n_steps=match.num_steps,
        batch_size=match.batch // match.minibatches,
        n_epochs=match.epochs,
        learning_rate=match.lr,
        gamma=match.gamma,
        gae_lambda=match.gae_lambda,
        clip_range=match.clip,
        ent_coef=match.entropy_coef,
        vf_coef=match.value_coef,
        max_grad_norm=match.max_grad_norm,
        policy_kwargs={"net_arch": list(match.hidden), "activation_fn": activation, **more},
        stats_window_size=window,
        seed=0,
        device="cpu",
    )
    watch = Watch()
    with suppress(StopIteration):
        model.learn(10**12, callback=watch)
    return watch.clock


def vector_env(match: Match) -> Any:
    """Returns our environments, with whole trials as episodes, as a `VecEnv`."""
    from stable_baselines3.common.vec_env import VecEnv

    from dmrl_ray.rllib.environments import EnvSettings, LockstepEnvs

    class Trials(VecEnv):
        def __init__(self, envs: LockstepEnvs, action_space: Space[Any]) -> None:
            super().__init__(envs.num_envs, envs.observe.space, action_space)
            self.envs = envs

        def reset(self) -> np.ndarray:
            return self.envs.restart(np.random.default_rng(0))

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            obs, reward, terminated, truncated, _ = self.envs.step(self.actions)
            done = terminated | truncated
            infos: list[dict[str, Any]] = [{} for _ in done]
            if done.any():
                rows, _ = self.envs.take_episodes()
                for i, row in enumerate(rows[-len(done) :]):
                    infos[i] = {"episode": {"r": row["return"], "l": row["length"]}}
                    infos[i] |= {"terminal_observation": obs[i], "TimeLimit.truncated": False}
                obs = self.envs.proceed()
            return obs, reward, done, infos

        def close(self) -> None:
            pass

        def get_attr(self, name: str, indices: Any = None) -> list[Any]:
            return [None] * self.num_envs

        def set_attr(self, name: str, value: Any, indices: Any = None) -> None:
            pass

        def env_method(self, name: str, *arguments: Any, **options: Any) -> list[Any]:
            return [None] * self.num_envs

        def env_is_wrapped(self, kind: Any, indices: Any = None) -> Sequence[bool]:
            return [False] * self.num_envs

    settings = EnvSettings(tasks=match.config.tasks, whole_trials=True, previous="flat")
    return Trials(LockstepEnvs(settings, match.num_envs), match.family().action_space)
