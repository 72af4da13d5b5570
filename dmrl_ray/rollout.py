"""The hot loop: a policy acts in many environment columns at once.

One call of the policy and one of the environment per step, whatever the number of columns.
Random numbers, values and log-probabilities are computed for a whole rollout at a time, outside
the loop over steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.arrays import host
from dmrl_ray.buffers import Buffers
from dmrl_ray.episodes import Episodes
from dmrl_ray.faults import answer_of, check_finite, fault, first_obs
from dmrl_ray.networks.base import Memory
from dmrl_ray.policy import ActorCritic, Previous
from dmrl_ray.tasks import TaskDistribution
from dmrl_ray.types import (
    Arrays,
    Columns,
    EnvironmentFault,
    Rollout,
    Task,
    tasks_from_array,
)
from dmrl_ray.values import Carried, peek_value, values

Actor: TypeAlias = Callable[
    [Tensor, Previous | None, Memory, Tensor | None], tuple[Tensor, Tensor, Memory]
]
"""`ActorCritic.forward`, or a function like it with other parameters inside."""


class Sampler:
    """Plays one shard's columns: the environments, the policy's memory, the open episodes.

    Args:
        distribution: the task family.
        num_envs: B.
        memory_spans_trial: True resets the policy's memory only where a trial begins; False at
            every episode's end.

    Attributes:
        env_s: seconds spent in the environments since `start`.
        inference_s: seconds spent in the policy since then.
    """

    def __init__(
        self, distribution: TaskDistribution, num_envs: int, *, memory_spans_trial: bool
    ) -> None:
        self.distribution = distribution
        self.num_envs = num_envs
        self.memory_spans_trial = memory_spans_trial
        self.env = answer_of(distribution, distribution.make_vec, num_envs)
        space = distribution.action_space
        self._discrete = space.dtype is not None and np.issubdtype(space.dtype, np.integer)
        self._action_shape = () if self._discrete else tuple(space.shape or ())
        self._action_dtype = np.int64 if self._discrete else np.float32
        self.episodes = Episodes(num_envs)
        self._has_episodes = False

    def start(self, rng: np.random.Generator, policy_version: int, *, greedy: bool = False) -> None:
        """Begin a collection: all randomness until the next start comes from `rng`."""
        env_rng, self.rng = rng.spawn(2)
        self.env.np_random = env_rng
        self._policy_version = policy_version
        self._greedy = greedy
        self._steps = 0
        self.env_s = self.inference_s = 0.0
        self.episodes.clear()

    def begin_trial(self, tasks: Sequence[Task], policy: ActorCritic) -> None:
        """Put every column at the start of a trial; column b plays task ``b * n // B`` of n."""
        self.set_tasks(tasks)
        self.episodes.begin_trial()
        self.begin_episodes()
        self.memory = policy.initial_memory(self.num_envs)

    def begin_episodes(self, *, forget: bool = True) -> None:
        """Reset every column, dropping open episodes; `forget` resets the memory with them."""
        shape = (self.num_envs, *self._action_shape)
        self._obs = first_obs(self.distribution, self.env)
        self.episodes.begin(self._pending_task_of)
        self._previous_done = np.ones(self.num_envs, np.bool_)
        self._has_episodes = True
        if forget:
            none = -1 if self._discrete else 0
            self._previous_action = np.full(shape, none, self._action_dtype)
            self._previous_reward = np.zeros(self.num_envs, np.float32)
            self._reset = np.ones(self.num_envs, np.bool_)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Give every column a task that it plays from its next episode on."""
        self._task_index = np.arange(self.num_envs) * len(tasks) // self.num_envs
        self._pending_task_of = np.empty(self.num_envs, object)
        self._pending_task_of[:] = [tasks[i] for i in self._task_index.tolist()]
        answer_of(self.distribution, self.env.set_tasks, list(self._pending_task_of))

    def continue_episodes(self, tasks: Sequence[Task], policy: ActorCritic) -> None:
        """Go on with open episodes; a column takes its new task when its episode ends."""
        if self._has_episodes:
            self.set_tasks(tasks)
        else:
            self.begin_trial(tasks, policy)

    def rollout(
        self,
        policy: ActorCritic,
        num_steps: int,
        *,
        actor: Actor | None = None,
        adaptation_step: int = 0,
        with_value: bool = True,
        greedy: bool | None = None,
        teacher: float | None = None,
    ) -> Rollout:
        """Act for `num_steps` steps in every column.

        Args:
            policy: gives values, noise and log-probabilities.
            num_steps: T.
            actor: acts instead of `policy`, for instance with parameters of its own per task.
            adaptation_step: adaptation steps done before, for the record.
            with_value: False leaves `value` and `next_value` empty (T, 0).
            greedy: overrides what `start` was told.
            teacher: ask the environment's oracle what it would do at every step; in this share of
                the columns it acts, too. The environment must remember (`TaskVectorEnv`).

        Raises:
            EnvironmentFault: the family raised, or an observation or reward is not finite.
        """
        greedy = self._greedy if greedy is None else greedy
        before = (self._previous_action, self._previous_reward, self._previous_done)
        buffers = Buffers(num_steps, self._obs, before, self._reset, self.memory)
        if teacher is not None:
            buffers.teach(math.ceil(teacher * self.num_envs))
        with torch.no_grad():
            pi, features, peeks = self._act(
                policy, actor or policy, buffers, adaptation_step, greedy, with_value
            )
            acted = perf_counter()
            log_prob = policy.policy_head.log_prob(pi, torch.from_numpy(buffers.action))
            rollout = buffers.finish(self._task_index, self._policy_version, adaptation_step)
            rollout.log_prob = log_prob.numpy()
            check_finite(self.distribution, rollout, self.episodes, self._steps)
            if with_value:
                both = values(
                    policy, rollout, features, peeks, self._carried(), self.memory_spans_trial
                )
                rollout.value, rollout.next_value = (v.numpy() for v in both)
            self.inference_s += perf_counter() - acted
        self._steps += num_steps
        return rollout

    def take_episodes(self) -> Columns:
        """Rows of the episodes that ended since the last call, in the order they ended."""
        return self.episodes.take()

    def get_state(self) -> Arrays:
        """Everything open episodes and memory depend on; empty before the first trial.

        `storable` makes of it what a checkpoint can hold.
        """
        if not self._has_episodes:
            return {}
        of_env = answer_of(self.distribution, self.env.get_state)
        state: Arrays = {f"env.{name}": array for name, array in of_env.items()}
        state |= {f"memory.{i}": host(leaf) for i, leaf in enumerate(self.memory)}
        state |= {name: host(getattr(self, f"_{name}")) for name in STATE}
        state |= self.episodes.get_state()
        state["pending_task_of"] = self._pending_task_of
        return {name: np.array(array) for name, array in state.items()}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self._has_episodes = bool(state)
        if not state:
            return
        self.set_tasks(tasks_from_array(state["pending_task_of"]))
        self.episodes.set_state(state)
        of_env = {k[4:]: v for k, v in state.items() if k.startswith("env.")}
        answer_of(self.distribution, self.env.set_state, of_env)
        leaves = sorted(k for k in state if k.startswith("memory."))
        self.memory = tuple(torch.from_numpy(np.array(state[k])) for k in leaves)
        for name in STATE:
            setattr(self, f"_{name}", np.array(state[name]))

    def _act(
        self,
        policy: ActorCritic,
        actor: Actor,
        buffers: Buffers,
        adaptation_step: int,
        greedy: bool,
        with_value: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The loop over steps; returns pi (T, B, P), features and values peeked at truncations."""
        head = policy.policy_head
        num_steps = buffers.num_steps
        noise = None if greedy else head.noise(self.rng, num_steps, self.num_envs)
        pis, features, peeks = [], [], []
        keep_features = with_value and policy.value_encoder is None
        peek = with_value and policy.recurrent and not self.memory_spans_trial
        memory = self.memory
        for t in range(num_steps):
            previous = buffers.previous(t) if policy.sees_previous else None
            reset = torch.from_numpy(buffers.reset[t : t + 1]) if buffers.reset[t].any() else None
            began = perf_counter()
            pi, feature, memory = actor(
                buffers.obs_tensor[t : t + 1], previous, memory, reset if policy.recurrent else None
            )
            action = head.mode(pi[0]) if noise is None else head.sample(pi[0], noise[t])
            pis.append(pi)
            if keep_features:
                features.append(feature)
            buffers.action[t] = action.numpy()
            self.inference_s += perf_counter() - began
            if buffers.taught:
                buffers.follow(t, answer_of(self.distribution, self.env.oracle_action))
            ended = self._step_env(buffers, t, adaptation_step)
            if peek and ended is not None:
                final_obs, action, reward = (
                    torch.from_numpy(x)
                    for x in (
                        buffers.final_obs[-1],
                        buffers.action[t, ended],
                        buffers.reward[t, ended],
                    )
                )
                then = tuple(leaf[torch.from_numpy(ended)] for leaf in memory)
                peeks.append(peek_value(policy, final_obs, action, reward, then))
        self.memory = memory
        self._carry(buffers)
        return torch.cat(pis), torch.cat(features) if features else None, peeks

    def _step_env(self, buffers: Buffers, t: int, adaptation_step: int) -> np.ndarray | None:
        """Step all columns; returns the columns whose episode ended, or None."""
        action = buffers.action[t]
        if not self._discrete:
            action = np.clip(action, -1.0, 1.0)
        try:
            began = perf_counter()
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.env_s += perf_counter() - began
            if obs.shape != self._obs.shape:  # NumPy would stretch some of the others.
                raise ValueError(f"observations {obs.shape} instead of {self._obs.shape}")
            buffers.obs[t + 1] = obs
            buffers.reward[t] = reward
            buffers.terminated[t] = terminated
            buffers.truncated[t] = truncated
            self.episodes.add(reward)
            done = buffers.done[t]
            np.logical_or(terminated, truncated, out=done)
            if not done.any():
                return None
            ended = np.flatnonzero(done)
            buffers.end(t, ended, info["final_obs"])
        except EnvironmentFault:
            raise
        except Exception as error:  # A family may raise anything.
            raise fault(self.distribution, "step", error) from error
        self.episodes.end(
            ended,
            self._steps + t + 1,
            None if self.memory_spans_trial else adaptation_step,
            info.get("success"),
            self._pending_task_of,
        )
        if not self.memory_spans_trial:
            buffers.reset[t + 1] = done
        return ended

    def _carried(self) -> Carried:
        """What the policy would be shown at the step after the last one."""
        before = (self._previous_action, self._previous_reward, self._previous_done)
        return Carried(self.memory, before, self._reset)

    def _carry(self, buffers: Buffers) -> None:
        """What the next rollout starts from."""
        self._obs = buffers.obs[-1].copy()
        self._reset = buffers.reset[-1].copy()
        self._previous_action = buffers.action[-1].copy()
        self._previous_reward = buffers.reward[-1].copy()
        self._previous_done = buffers.done[-1].copy()


STATE = ("obs", "previous_action", "previous_reward", "previous_done", "reset")
"""Attributes of a sampler, each an array (B, ...): what the next step starts from."""
