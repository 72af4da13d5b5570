"""The arrays of one rollout while it is being filled."""

from __future__ import annotations

import numpy as np
import torch

from dmrl_ray.networks.actor_critic import Previous, mask_previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.types import Rollout


class Buffers:
    """The arrays of one rollout while it is being filled.

    Args:
        num_steps: at most.
        obs, previous, reset, memory: before step 0.
        room: steps that there is room for until `grow` is called.
    """

    def __init__(
        self,
        num_steps: int,
        obs: np.ndarray,
        previous: tuple[np.ndarray, np.ndarray, np.ndarray],
        reset: np.ndarray,
        memory: Memory,
        *,
        room: int,
    ) -> None:
        columns = len(obs)
        shape = (room, columns)
        self.num_steps = num_steps
        self.room = room
        self.obs = np.empty((room + 1, *obs.shape), obs.dtype)
        self.obs[0] = obs
        self.obs_tensor = torch.from_numpy(self.obs)
        self.action = np.empty((room, *previous[0].shape), previous[0].dtype)
        self.reward = np.empty(shape, np.float32)
        self.terminated = np.empty(shape, np.bool_)
        self.truncated = np.empty(shape, np.bool_)
        self.done = np.empty(shape, np.bool_)
        self.mask = np.ones(shape, np.bool_)
        self.reset = np.zeros((room + 1, columns), np.bool_)
        self.reset[0] = reset
        self.before = previous
        self.expert_action = np.empty((room, 0), np.float32)
        self.taught = False
        self.memory = memory
        self.final_step: list[np.ndarray] = []
        self.final_env: list[np.ndarray] = []
        self.final_obs: list[np.ndarray] = []

    def grow(self) -> None:
        """Make room for twice as many steps."""
        extra = min(self.room, self.num_steps - self.room)
        self.room += extra
        for name in (*_BY_STEP, "obs", "reset"):
            old = getattr(self, name)
            new = np.empty((len(old) + extra, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)
        self.mask[-extra:], self.reset[-extra:] = True, False
        self.obs_tensor = torch.from_numpy(self.obs)

    def teach(self, columns: int) -> None:
        """Make room for the oracle's actions; it acts in the first of the columns."""
        self.expert_action = np.empty_like(self.action)
        self.taught, self._followed = True, columns

    def follow(self, t: int, expert_action: np.ndarray) -> None:
        """Note what the oracle would do at step t, and let it act where it is followed."""
        self.expert_action[t] = expert_action
        self.action[t, : self._followed] = expert_action[: self._followed]

    def end(self, t: int, columns: np.ndarray, final_obs: np.ndarray) -> None:
        """Keep the true successors of the columns whose episodes ended at step t."""
        self.final_step.append(np.full(len(columns), t))
        self.final_env.append(columns)
        self.final_obs.append(final_obs[columns])

    def previous(self, t: int) -> Previous:
        """Action, reward and done before step t, (1, B, ...), and nothing after a reset."""
        if t == 0:
            action, reward, done = (torch.from_numpy(x).unsqueeze(0) for x in self.before)
        else:
            steps = slice(t - 1, t)
            action, reward, done = (
                torch.from_numpy(x[steps]) for x in (self.action, self.reward, self.done)
            )
        if not self.reset[t].any():
            return action, reward, done
        return mask_previous(action, reward, done, torch.from_numpy(self.reset[t : t + 1]))

    def cut(self, num_steps: int) -> None:
        """Keep this many steps, as no environment has more to play."""
        self.num_steps = num_steps
        self.obs, self.reset = self.obs[: num_steps + 1], self.reset[: num_steps + 1]
        for name in _BY_STEP:
            setattr(self, name, getattr(self, name)[:num_steps])

    def finish(
        self, task_index: np.ndarray, policy_version: int, adaptation_step: np.ndarray | int
    ) -> Rollout:
        """The rollout, still without what the policy thought of it."""
        empty = np.empty((self.num_steps, 0), np.float32)
        ended = bool(self.final_step)
        return Rollout(
            task_index=task_index,
            policy_version=policy_version,
            adaptation_step=np.full(len(task_index), adaptation_step),
            obs=self.obs,
            final_step=np.concatenate(self.final_step) if ended else np.empty(0, np.int64),
            final_env=np.concatenate(self.final_env) if ended else np.empty(0, np.int64),
            final_obs=np.concatenate(self.final_obs) if ended else self.obs[0, :0],
            action=self.action,
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            mask=self.mask,
            all_count=bool(self.mask.all()),
            reset=self.reset[:-1],
            log_prob=empty,
            value=empty,
            next_value=empty,
            advantage=empty,
            value_target=empty,
            expert_action=self.expert_action,
            previous_action=self.before[0],
            previous_reward=self.before[1],
            previous_done=self.before[2],
            initial_memory=tuple(leaf.numpy() for leaf in self.memory),
        )


_BY_STEP = ("action", "reward", "terminated", "truncated", "done", "mask", "expert_action")
"""Arrays (T, B, ...); those of observations and resets have one step more."""
