"""The hot loop: a policy acts in many environment columns at once.

One call of the policy and one of the environment per step, whatever the number of columns.
Random numbers, values and log-probabilities are computed for a whole rollout at a time, outside
the loop over steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.backend import host
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.networks.heads import CategoricalHead, GaussianHead, SquashedGaussianHead
from dmrl_ray.rollout.buffers import Buffers
from dmrl_ray.rollout.episodes import Episodes, Open
from dmrl_ray.rollout.finite import check_finite, diverged
from dmrl_ray.rollout.values import Carried, bootstrap_value, values
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of, fault, first_obs
from dmrl_ray.types import (
    Arrays,
    Columns,
    EnvironmentFault,
    Rollout,
    Task,
    tasks_from_array,
)

Head: TypeAlias = CategoricalHead | GaussianHead | SquashedGaussianHead

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
        policy_version: updates of the policy that acts.
        fresh: all environments were reset, and nothing was played since.
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
        self.fresh = False

    def start(
        self,
        rng: np.random.Generator,
        policy_version: int,
        *,
        greedy: bool = False,
        task_updates: int = 0,
    ) -> None:
        """Begin a collection.

        Args:
            rng: all randomness until the next start comes from it.
            policy_version: updates of the policy.
            greedy: take the most probable actions.
            task_updates: of the policy, on these very tasks; trials go on with their experience.
        """
        env_rng, self.rng = rng.spawn(2)
        self.env.np_random = env_rng
        self.policy_version = policy_version
        self._greedy = greedy
        self._steps_done = 0
        self.env_s = self.inference_s = 0.0
        self.episodes.start(task_updates)

    def begin_trial(
        self,
        tasks: Sequence[Task],
        policy: ActorCritic,
        episodes: int | None = None,
        *,
        one_agent: bool = False,
    ) -> None:
        """Put every environment at the start of a trial; b of B plays task ``b * n // B`` of n.

        Args:
            tasks: n.
            policy: whose memory begins.
            episodes: that each environment plays; None sets no end.
            one_agent: as `set_tasks`.
        """
        self.episodes.begin_trial()
        self.set_tasks(tasks, one_agent=one_agent)
        self.begin_episodes(episodes)
        self.memory = policy.initial_memory(self.num_envs)

    def begin_episodes(self, episodes: int | None = None, *, forget: bool = True) -> None:
        """Reset every environment, dropping open episodes; `forget` resets the memory with them.

        From here on each plays `episodes`, a number that does not depend on what happens: those
        with short ones wait for the others, and steps after the last one do not count.
        """
        if self.fresh:  # Nothing was played since the last reset, which is as good as another.
            self.episodes.limit(episodes)
            return
        shape = (self.num_envs, *self._action_shape)
        self._obs = first_obs(self.distribution, self.env)
        self.fresh = True
        self.episodes.begin(self._pending_task_of, episodes, forget=forget)
        self._previous_done = np.ones(self.num_envs, np.bool_)
        self._has_episodes = True
        if forget:
            none = -1 if self._discrete else 0
            self._previous_action = np.full(shape, none, self._action_dtype)
            self._previous_reward = np.zeros(self.num_envs, np.float32)
            self._reset = np.ones(self.num_envs, np.bool_)

    def set_tasks(self, tasks: Sequence[Task], *, one_agent: bool = False) -> None:
        """Give every column a task that it plays from its next episode on.

        Args:
            tasks: n, of agents 0 to n - 1, each of which has columns of its own.
            one_agent: one in all columns has them.
        """
        self._task_index = np.arange(self.num_envs) * len(tasks) // self.num_envs
        self._pending_task_of = np.empty(self.num_envs, object)
        self._pending_task_of[:] = [tasks[i] for i in self._task_index.tolist()]
        self.fresh = False
        agents = None if one_agent else self._task_index
        self.episodes.assign(self._pending_task_of.tolist(), agents)
        answer_of(self.distribution, self.env.set_tasks, list(self._pending_task_of))

    @property
    def playing(self) -> bool:
        """Whether any environment has episodes left to play."""
        return self.episodes.any_playing

    def continue_episodes(self, tasks: Sequence[Task], policy: ActorCritic) -> None:
        """Go on with open episodes; a column takes its new task when its episode ends."""
        if self._has_episodes:
            self.set_tasks(tasks, one_agent=True)
        else:
            self.begin_trial(tasks, policy, one_agent=True)

    def open_episodes(self) -> Open | None:
        """What `continue_episodes` would go on with; None before the first trial."""
        return self.episodes.open() if self._has_episodes else None

    def rollout(
        self,
        policy: ActorCritic,
        num_steps: int | None = None,
        *,
        actor: Actor | None = None,
        adaptation_step: np.ndarray | int = 0,
        with_value: bool = True,
        greedy: bool | None = None,
        beta: float | None = None,
    ) -> Rollout:
        """Act in every environment until each has played its episodes, or for `num_steps` steps.

        Args:
            policy: gives values, noise and log-probabilities.
            num_steps: T at most; needed where episodes have no end.
            actor: acts instead of `policy`, for instance with parameters of its own per task.
            adaptation_step: (B,) adaptation steps done before, for the record.
            with_value: False leaves `value` and `next_value` empty (T, 0).
            greedy: overrides what `start` was told.
            beta: ask the environment's oracle what it would do at every step; in this share of
                the columns it acts, too. The environment must remember (`TaskVectorEnv`).

        Raises:
            EnvironmentFault: the family raised, or an observation or reward is not finite.
            NumericalError: all they are, but what the policy makes of them is not.
        """
        greedy = self._greedy if greedy is None else greedy
        before = (self._previous_action, self._previous_reward, self._previous_done)
        self.episodes.adapted(None if self.memory_spans_trial else adaptation_step)
        most = self._most_steps(num_steps)
        room = self._at_once(most)
        buffers = Buffers(most, self._obs, before, self._reset, self.memory, room=room)
        if beta is not None:
            buffers.teach(math.ceil(beta * self.num_envs))
        with torch.no_grad():
            pi, features, peeks = self._act(
                policy,
                actor or policy,
                buffers,
                adaptation_step,
                greedy=greedy,
                with_value=with_value,
            )
            acted = perf_counter()
            log_prob = policy.policy_head.log_prob(pi, torch.from_numpy(buffers.action))
            rollout = buffers.finish(self._task_index, self.policy_version, adaptation_step)
            rollout.log_prob = log_prob.numpy()
            check_finite(self.distribution, rollout, self.episodes, self._steps_done)
            if torch.isnan(pi.sum()):  # Discrete actions do not show it.
                raise diverged(self.policy_version, adaptation_step)
            if with_value:
                both = values(
                    policy, rollout, features, peeks, self._carried(), self.memory_spans_trial
                )
                rollout.value, rollout.next_value = (v.numpy() for v in both)
            self.inference_s += perf_counter() - acted
        self._steps_done += rollout.num_steps
        self.fresh = False
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
        self.episodes.set_state(state, self._pending_task_of.tolist())
        of_env = {k[4:]: v for k, v in state.items() if k.startswith("env.")}
        answer_of(self.distribution, self.env.set_state, of_env)
        leaves = sorted(k for k in state if k.startswith("memory."))
        self.memory = tuple(torch.from_numpy(np.array(state[k])) for k in leaves)
        for name in STATE:
            setattr(self, f"_{name}", np.array(state[name]))

    def _most_steps(self, num_steps: int | None) -> int:
        """Steps that a rollout may take."""
        if self.episodes.unlimited:
            assert num_steps is not None, "episodes have no end"
            return num_steps
        left = self.episodes.steps_left(self.distribution.max_episode_steps)
        return left if num_steps is None else min(left, num_steps)

    def _act(
        self,
        policy: ActorCritic,
        actor: Actor,
        buffers: Buffers,
        adaptation_step: np.ndarray | int,
        *,
        greedy: bool,
        with_value: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The loop over steps; returns pi (T, B, P), features and values peeked at truncations."""
        head = policy.policy_head
        pis, features, peeks = [], [], []
        keep_features = with_value and policy.value_encoder is None
        peek = with_value and policy.recurrent and not self.memory_spans_trial
        memory, episodes = self.memory, self.episodes
        noise = self._noise_by_step(head, buffers.num_steps, greedy)
        for t in range(buffers.num_steps):
            if t == buffers.room:
                buffers.grow()
            previous = buffers.previous(t) if policy.sees_previous else None
            reset = torch.from_numpy(buffers.reset[t : t + 1]) if buffers.reset[t].any() else None
            if not episodes.all_playing:
                buffers.mask[t] = episodes.playing
                self.env.idle = ~episodes.playing
            began = perf_counter()
            pi, feature, after = actor(
                buffers.obs_tensor[t : t + 1], previous, memory, reset if policy.recurrent else None
            )
            memory = after if episodes.all_playing else self._held(memory, after)
            drawn = next(noise)
            action = head.mode(pi[0]) if drawn is None else head.sample(pi[0], drawn)
            pis.append(pi)
            if keep_features:
                features.append(feature)
            buffers.action[t] = action.numpy()
            if not (self._discrete or np.isfinite(buffers.action[t]).all()):
                raise self._whose_fault(buffers, t, adaptation_step)
            self.inference_s += perf_counter() - began
            if buffers.taught:
                buffers.follow(t, answer_of(self.distribution, self.env.expert_action))
            ended = self._step_env(buffers, t, greedy)
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
                peeks.append(bootstrap_value(policy, final_obs, action, reward, then))
            if not episodes.any_playing:
                buffers.cut(t + 1)
                break
        self.memory, self.env.idle = memory, None
        self._carry(buffers)
        return torch.cat(pis), torch.cat(features) if features else None, peeks

    def _at_once(self, num_steps: int) -> int:
        """Steps to prepare for at a time: all where it is known that they come.

        Where episodes may end early, what all of them would take could fill the memory.
        """
        known = self.episodes.unlimited or self.distribution.fixed_length
        return num_steps if known else min(num_steps, BLOCK_STEPS)

    def _noise_by_step(self, head: Head, num_steps: int, greedy: bool) -> Iterator[Tensor | None]:
        """The noise of each step's actions."""
        if greedy:
            yield from repeat(None)
        block = self._at_once(num_steps)
        for start in range(0, num_steps, block):
            yield from head.noise(self.rng, min(block, num_steps - start), self.num_envs)

    def _held(self, memory: Memory, after: Memory) -> Memory:
        """The memory after a step; of environments that wait, as it was."""
        playing = torch.from_numpy(self.episodes.playing)
        return tuple(
            torch.where(playing.view(-1, *[1] * (old.dim() - 1)), new, old)
            for old, new in zip(memory, after, strict=True)
        )

    def _step_env(self, buffers: Buffers, t: int, greedy: bool) -> np.ndarray | None:
        """Step all environments; returns those whose episode ended, or None."""
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
            if "success" in info:
                self.episodes.see(info["success"])
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
        step = self._steps_done + t + 1
        self.episodes.end(ended, step, self._pending_task_of, greedy=greedy)
        if not self.memory_spans_trial:
            buffers.reset[t + 1] = done
        return ended

    def _whose_fault(
        self, buffers: Buffers, t: int, adaptation_step: np.ndarray | int
    ) -> Exception:
        """Of an action at step t that is not finite: the environment's if it began there."""
        buffers.cut(t)
        rollout = buffers.finish(self._task_index, self.policy_version, adaptation_step)
        check_finite(self.distribution, rollout, self.episodes, self._steps_done)
        return diverged(self.policy_version, adaptation_step)

    def _carried(self) -> Carried:
        """What the policy would be shown at the step after the last one."""
        before = (self._previous_action, self._previous_reward, self._previous_done)
        return Carried(self.memory, before, self._reset)

    def _carry(self, buffers: Buffers) -> None:
        """What the next rollout starts from; who waits keeps its last step that counted."""
        self._obs = buffers.obs[-1].copy()
        self._reset = buffers.reset[-1].copy()
        last = ("action", "reward", "done")
        if buffers.mask[-1].all():
            for name in last:
                setattr(self, f"_previous_{name}", getattr(buffers, name)[-1].copy())
            return
        count = buffers.mask.sum(0)
        played = np.flatnonzero(count)
        for name in last:
            kept = getattr(self, f"_previous_{name}").copy()
            kept[played] = getattr(buffers, name)[count[played] - 1, played]
            setattr(self, f"_previous_{name}", kept)


BLOCK_STEPS = 64
"""Steps that are prepared for at a time where episodes may end early."""

STATE = ("obs", "previous_action", "previous_reward", "previous_done", "reset")
"""Attributes of a sampler, each an array (B, ...): what the next step starts from."""
