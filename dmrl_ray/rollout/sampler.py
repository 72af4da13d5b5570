"""Rollouts: a policy acts in many environments at once, and its steps become a `Rollout`.

One call of the policy and one of the environments per step, whatever their number. Random numbers,
values and log-probabilities are computed for a whole rollout at a time, outside the loop over
steps. `DeviceSampler` brings environments on a device; loop, storage and values are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.backend import Stream, as_kind_of, copy_of, host, namespace, resized
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, mask_previous
from dmrl_ray.networks.base import Memory, select_memory
from dmrl_ray.rollout.episodes import Episodes, Open
from dmrl_ray.rollout.finite import check_finite, diverged
from dmrl_ray.tasks.activity import COMPUTING, STEP, mine
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import RAISED, answer_of, fault, first_obs
from dmrl_ray.types import Array, Arrays, Columns, EnvironmentFault, Rollout, Task, tasks_from_array

Actor: TypeAlias = Callable[
    [Tensor, Previous | None, Memory, Tensor | None], tuple[Tensor, Tensor, Memory]
]
"""`ActorCritic.forward`, or a function like it with other parameters inside."""


class Storage:
    """The steps of one rollout while they are collected: arrays, or tensors on a device.

    Row t of `inputs` is what step t starts from: they have one row more than there are steps.

    Args:
        num_steps: at most.
        room: steps that there is room for until `resize` is called.
        first: row 0 of `inputs`, with the names `INPUTS`.
        memory: before step 0.
        any_reset: whether memory is reset in any environment before the next step.
        adaptation_step: (B,) adaptation steps done before.
        greedy: the most probable actions are taken.
        expert_envs: environments in which the expert acts; None where it is not asked.

    Attributes:
        idle: (T, B) bool, environments that have played their episodes while others still play.
        ends: step, environments and true successors of episodes that ended together.
        pi, features, final_values: lists of the policy's outputs at each step, of features that
            the critic shares, and of the values of `ends` where memory ends with the episode.
    """

    def __init__(
        self,
        num_steps: int,
        room: int,
        first: tuple[Array, ...],
        memory: Memory,
        *,
        any_reset: bool,
        adaptation_step: np.ndarray | int,
        greedy: bool,
        expert_envs: int | None,
    ) -> None:
        self.num_steps, self.memory, self.any_reset = num_steps, memory, any_reset
        self.adaptation_step, self.greedy, self.expert_envs = adaptation_step, greedy, expert_envs
        self.all_count = True  # No environment was idle in any step.
        self.pi, self.features, self.final_values = (list[Tensor]() for _ in range(3))
        self.inputs = tuple(x[None] for x in first)
        obs, reset, action, reward, _ = self.inputs
        self.terminated = self.truncated = self.idle = reset[:0]
        self.expert_action = reward[:0, :0] if expert_envs is None else action[:0]
        xp = namespace(obs)
        self.ends = [(0, xp.zeros_like(reset[0, :0], dtype=xp.int64), obs[0, :0])]
        self.resize(room)

    def resize(self, room: int) -> None:
        """Keep this many steps, or make room for them; rows that are added are zero."""
        self.room = room
        self.inputs = tuple(resized(x, room + 1) for x in self.inputs)
        self.obs, self.reset, action, reward, done = self.inputs
        self.action, self.reward, self.done = action[1:], reward[1:], done[1:]
        self.terminated, self.truncated, self.idle, self.expert_action = (
            resized(x, room)
            for x in (self.terminated, self.truncated, self.idle, self.expert_action)
        )
        self.obs_tensor, self.reset_tensor, *self._previous = map(torch.as_tensor, self.inputs)

    def previous(self, steps: slice, reset: Tensor | None) -> Previous:
        """Action, reward and done before each of these steps; none where memory is reset."""
        action, reward, done = (x[steps] for x in self._previous)
        if reset is None:
            return action, reward, done
        return mask_previous(action, reward, done, reset)

    def close(self, num_steps: int) -> None:
        """Keep the first `num_steps` steps and join the ends of their episodes."""
        self.num_steps, xp = num_steps, namespace(self.obs)
        self.resize(num_steps)
        steps = [xp.full_like(envs, t) for t, envs, _ in self.ends]
        _, envs, obs = zip(*self.ends, strict=True)
        self.final_step, self.final_env, self.final_obs = map(xp.concatenate, (steps, envs, obs))

    def rollout(
        self,
        log_prob: Tensor,
        values: tuple[Tensor, Tensor] | None,
        task_index: np.ndarray,
        policy_version: int,
    ) -> Rollout:
        """The rollout of the steps that were kept, without the advantages of an algorithm."""
        empty = self.reward[:, :0]
        value, next_value = (as_kind_of(empty, x) for x in values) if values else (empty, empty)
        _, _, *previous = (x[0] for x in self.inputs)
        return Rollout(
            task_index=task_index,
            policy_version=policy_version,
            adaptation_step=np.full(len(task_index), self.adaptation_step),
            obs=self.obs,
            final_step=self.final_step,
            final_env=self.final_env,
            final_obs=self.final_obs,
            action=self.action,
            reward=self.reward,
            terminated=self.terminated,
            truncated=self.truncated,
            mask=~self.idle,
            all_count=self.all_count,
            reset=self.reset[:-1],
            log_prob=as_kind_of(empty, log_prob),
            value=value,
            next_value=next_value,
            advantage=empty,
            value_target=empty,
            expert_action=self.expert_action,
            **dict(zip(INPUTS[2:], previous, strict=True)),
            initial_memory=tuple(as_kind_of(empty, leaf) for leaf in self.memory),
        )


class Sampler:
    """Acts in the environments of one shard, and keeps what continues from rollout to rollout.

    Args:
        distribution: the task family.
        num_envs: B.
        memory_spans_trial: True resets the policy's memory only where a trial begins; False at
            every episode's end.

    Attributes:
        policy_version: updates of the policy that acts.
        fresh: all environments were reset, and took no step since.
        check: called before every step; what it raises ends the rollout.
        env_s: seconds spent in the environments since `start`.
        inference_s: seconds spent in the policy since then.
    """

    def __init__(
        self, distribution: TaskDistribution, num_envs: int, *, memory_spans_trial: bool
    ) -> None:
        self.distribution, self.num_envs = distribution, num_envs
        self.memory_spans_trial = memory_spans_trial
        self._activity = mine()
        self.env = answer_of(distribution, distribution.make_vec, num_envs)
        space = distribution.action_space
        self._discrete = space.dtype is not None and np.issubdtype(space.dtype, np.integer)
        self._action_shape = () if self._discrete else tuple(space.shape or ())
        self._action_dtype = np.int64 if self._discrete else np.float32
        self.episodes = Episodes(num_envs)
        self._envs: Array = np.arange(num_envs)
        self._next: tuple[Array, ...] = ()  # INPUTS of the next step, once there was a reset
        self.fresh = False
        self.check: Callable[[], None] = lambda: None

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
            task_updates: updates of the policy on the tasks it will play; their trials continue.
        """
        env_rng, self.rng = rng.spawn(2)
        self.env.np_random, self._noise = self._stream(env_rng), self._stream(self.rng)
        self.policy_version = policy_version
        self._greedy = greedy
        self._steps_done = 0
        self.env_s = self.inference_s = 0.0
        self.episodes.begin_collection(task_updates)

    def begin_trial(
        self,
        tasks: Sequence[Task],
        policy: ActorCritic,
        episodes: int | None = None,
        *,
        one_agent: bool = False,
    ) -> None:
        """Put every environment at the start of a trial; b of B plays task ``b * n // B`` of n.

        Each plays `episodes`, without end if None; agents are those of `set_tasks`.
        """
        self.episodes.begin_trial()
        self.set_tasks(tasks, one_agent=one_agent)
        self.begin_episodes(episodes)
        self.memory = tuple(self._put(leaf) for leaf in policy.initial_memory(self.num_envs))

    def begin_episodes(self, episodes: int | None = None, *, forget: bool = True) -> None:
        """Reset every environment, dropping open episodes; `forget` resets the memory with them.

        From here on each plays `episodes`, a number that does not depend on what happens: those
        with short ones wait for the others, and steps after the last one do not count.
        """
        if self.fresh:  # No step was taken since the last reset: another would change nothing.
            self.episodes.set_quota(episodes)
            return
        obs = first_obs(self.distribution, self.env)
        self.fresh = True
        self.episodes.begin_episodes(self._pending_task_of, episodes, forget=forget)
        done = np.ones(self.num_envs, np.bool_)
        if forget:
            shape, none = (self.num_envs, *self._action_shape), -1 if self._discrete else 0
            action = np.full(shape, none, self._action_dtype)
            first = obs, done, action, np.zeros(self.num_envs, np.float32), done
            self._any_reset = True
        else:
            first = obs, *self._next[1:4], done
        self._next = tuple(self._put(x) for x in first)

    def set_tasks(self, tasks: Sequence[Task], *, one_agent: bool = False) -> None:
        """Give every environment a task that it plays from its next episode on.

        Args:
            tasks: n, of agents 0 to n - 1, each of which has environments of its own.
            one_agent: a single agent acts in all environments.
        """
        self._task_index = np.arange(self.num_envs) * len(tasks) // self.num_envs
        self._pending_task_of = np.empty(self.num_envs, object)
        self._pending_task_of[:] = [tasks[i] for i in self._task_index.tolist()]
        self._activity.first(tasks[0].id)
        self.fresh = False
        agents = None if one_agent else self._task_index
        self.episodes.assign(self._pending_task_of.tolist(), agents)
        answer_of(self.distribution, self.env.set_tasks, list(self._pending_task_of))

    @property
    def playing(self) -> bool:
        """Whether any environment has episodes left to play."""
        return self.episodes.any_playing

    def continue_episodes(self, tasks: Sequence[Task], policy: ActorCritic) -> None:
        """Continue the open episodes; new tasks begin where and when one of them ends."""
        if self._next:
            self.set_tasks(tasks, one_agent=True)
        else:
            self.begin_trial(tasks, policy, one_agent=True)

    def open_episodes(self) -> Open | None:
        """The episodes that `continue_episodes` continues; None before the first trial."""
        return self.episodes.open() if self._next else None

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
        """Act in all environments until each has played its episodes, or for `num_steps` steps.

        Args:
            policy: gives values, noise and log-probabilities.
            num_steps: T at most; needed where episodes have no end.
            actor: acts instead of `policy`, for instance with parameters of its own per task.
            adaptation_step: (B,) adaptation steps done before, for the record.
            with_value: False leaves `value` and `next_value` empty (T, 0).
            greedy: overrides the setting of `start`.
            beta: record the expert's action at every step; in this share of the environments the
                expert acts, too. Requires environments that track their belief (`TaskVectorEnv`).

        Raises:
            EnvironmentFault: the family raised, or an observation or reward is not finite.
            NumericalError: these are finite, but the policy's actions are not.
        """
        self.episodes.set_adaptation_step(None if self.memory_spans_trial else adaptation_step)
        longest = self.distribution.max_episode_steps
        most = self.episodes.steps_left(longest, num_steps)
        # Where episodes may end early, storage for the longest of them could fill the memory.
        known = self.episodes.unlimited or self.distribution.fixed_length
        storage = Storage(
            most,
            most if known else min(most, BLOCK_STEPS),
            self._next,
            self.memory,
            any_reset=self._any_reset,
            adaptation_step=adaptation_step,
            greedy=self._greedy if greedy is None else greedy,
            expert_envs=None if beta is None else math.ceil(beta * self.num_envs),
        )
        with torch.no_grad():
            self._act(storage, policy, actor or policy, with_value)
            began = perf_counter()
            pi, action = torch.cat(storage.pi), torch.as_tensor(storage.action)
            log_prob = policy.policy_head.log_prob(pi, action)
            values = self._values(storage, policy) if with_value else None
            self.inference_s += perf_counter() - began
        self._check(storage, pi)
        self._steps_done += storage.num_steps
        self.fresh = False
        return storage.rollout(log_prob, values, self._task_index, self.policy_version)

    def take_episodes(self) -> Columns:
        """Rows of the episodes that ended since the last call, in the order they ended."""
        return self.episodes.take()

    def get_state(self) -> Arrays:
        """All that open episodes and memory depend on, for `storable`; empty before a trial."""
        if not self._next:
            return {}
        of_env = answer_of(self.distribution, self.env.get_state)
        state: Arrays = {f"env.{name}": array for name, array in of_env.items()}
        state |= {f"memory.{i}": host(leaf) for i, leaf in enumerate(self.memory)}
        state |= {name: host(x) for name, x in zip(INPUTS, self._next, strict=True)}
        state |= self.episodes.get_state()
        state["pending_task_of"] = self._pending_task_of
        return {name: np.array(array) for name, array in state.items()}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self._next = ()
        if not state:
            return
        self.set_tasks(tasks_from_array(state["pending_task_of"]))
        self.episodes.set_state(state, self._pending_task_of.tolist())
        of_env = {k[4:]: v for k, v in state.items() if k.startswith("env.")}
        answer_of(self.distribution, self.env.set_state, of_env)
        leaves = sorted(k for k in state if k.startswith("memory."))
        self.memory = tuple(self._put(torch.from_numpy(np.array(state[k]))) for k in leaves)
        self._next = tuple(self._put(np.array(state[name])) for name in INPUTS)
        self._any_reset = bool(state["reset"].any())

    def _put(self, x: Array) -> Array:
        """The same numbers where the environments are."""
        return x

    def _stream(self, rng: np.random.Generator) -> Stream:
        """A stream of random numbers where the environments are."""
        return rng

    def _act(self, storage: Storage, policy: ActorCritic, actor: Actor, with_value: bool) -> None:
        """Step until every environment has played its episodes, and keep the steps."""
        head, episodes, memory, block = policy.policy_head, self.episodes, self.memory, storage.room
        shares_features = with_value and policy.value_encoder is None
        bootstraps = with_value and policy.recurrent and not self.memory_spans_trial
        noise: Sequence[Tensor] = ()
        for t in range(storage.num_steps):
            self.check()
            if t == storage.room:
                storage.resize(min(2 * storage.room, storage.num_steps))
            if t % block == 0 and not storage.greedy:
                size = min(block, storage.num_steps - t)
                noise = head.noise(self._noise, size, self.num_envs).unbind()
            now = slice(t, t + 1)
            reset = storage.reset_tensor[now] if storage.any_reset else None
            previous = storage.previous(now, reset) if policy.sees_previous else None
            if not episodes.all_playing:
                storage.idle[t] = self.env.idle = ~episodes.playing
                storage.all_count = False
            began = perf_counter()
            pi, features, after = actor(
                storage.obs_tensor[now], previous, memory, reset if policy.recurrent else None
            )
            if not episodes.all_playing:
                after = select_memory(torch.from_numpy(episodes.playing), after, memory)
            memory = after
            action = head.sample(pi[0], noise[t % block]) if noise else head.mode(pi[0])
            storage.pi.append(pi)
            if shares_features:
                storage.features.append(features)
            storage.action[t] = as_kind_of(storage.action, action)
            self.inference_s += perf_counter() - began
            ended = self._step_env(storage, t)
            storage.any_reset = ended is not None and not self.memory_spans_trial
            if storage.any_reset:
                storage.reset[t + 1] = storage.done[t]
            if bootstraps and ended is not None:
                storage.final_values.append(_final_value(storage, policy, t, memory))
            if not episodes.any_playing:
                break
        storage.close(t + 1)
        self._carry(storage, memory)

    def _step_env(self, storage: Storage, t: int) -> Array | None:
        """Step all environments; returns those whose episodes ended, or None."""
        action = storage.action[t]
        if not (self._discrete or np.isfinite(action).all()):
            storage.close(t)
            check_finite(self.distribution, storage, self.episodes, self._steps_done)
            raise diverged(self.policy_version, storage.adaptation_step)
        if storage.expert_envs is not None:
            storage.expert_action[t] = answer_of(self.distribution, self.env.expert_action)
            action[: storage.expert_envs] = storage.expert_action[t, : storage.expert_envs]
        if not self._discrete:
            action = np.clip(action, -1.0, 1.0)
        try:
            began = self._activity.begin(STEP)
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.env_s += self._activity.begin(COMPUTING) - began
            if obs.shape != storage.obs[t].shape:  # NumPy would broadcast some of the others.
                raise ValueError(f"observations {obs.shape} instead of {storage.obs[t].shape}")
            storage.obs[t + 1], storage.reward[t] = obs, reward
            storage.terminated[t], storage.truncated[t] = terminated, truncated
            self.episodes.add_reward(reward)
            if "success" in info:
                self.episodes.add_success(info["success"])
            done = np.logical_or(terminated, truncated, out=storage.done[t])
            if not done.any():
                return None
            ended = np.flatnonzero(done)
            storage.ends.append((t, ended, info["final_obs"][ended]))
        except EnvironmentFault:
            raise
        except RAISED as error:
            raise fault(self.distribution, "step", error) from error
        step = self._steps_done + t + 1
        self.episodes.end_episodes(ended, step, self._pending_task_of, greedy=storage.greedy)
        return ended

    def _carry(self, storage: Storage, memory: Memory) -> None:
        """Keep what the next rollout starts from; idle environments keep their last action."""
        self.memory, self.env.idle = memory, None
        obs, reset, *previous = storage.inputs
        count = (~storage.idle).sum(0)
        last = (x[count, self._envs] for x in previous)
        self._next = (copy_of(obs[-1]), copy_of(reset[-1]), *last)
        self._any_reset = storage.any_reset

    def _check(self, storage: Storage, pi: Tensor) -> None:
        """Check that all numbers of the rollout are finite."""
        check_finite(self.distribution, storage, self.episodes, self._steps_done)
        if not torch.isfinite(pi.sum()):  # Discrete and squashed actions do not show it.
            raise diverged(self.policy_version, storage.adaptation_step)

    def _values(self, storage: Storage, policy: ActorCritic) -> tuple[Tensor, Tensor]:
        """V(obs) and V(true successor), 0 where terminated: (T, B) in units of return.

        Where memory spans the trial, returns run to its end and need no successor's value.
        """
        obs, last_obs = storage.obs_tensor[:-1], storage.obs_tensor[-1]
        features = torch.cat(storage.features) if storage.features else None
        if self.memory_spans_trial:
            reset = storage.reset_tensor[:-1]
            whole = slice(0, storage.num_steps)
            previous = storage.previous(whole, reset) if policy.sees_previous else None
            value = policy.denormalize_value(policy.value(features, obs, previous, reset))
            return value, torch.zeros_like(value)
        if policy.recurrent:
            last = policy.bootstrap_value(self._next, self.memory)
            final = torch.cat(storage.final_values) if storage.final_values else last[:0]
        else:
            rows = torch.cat([last_obs, torch.as_tensor(storage.final_obs)])
            both = policy.value(None, rows.unsqueeze(0))[0]
            last, final = both[: self.num_envs], both[self.num_envs :]
        value, end, successor = (
            policy.denormalize_value(v) for v in (policy.value(features, obs), last, final)
        )
        next_value = torch.cat([value[1:], end.unsqueeze(0)])
        next_value[storage.final_step, storage.final_env] = successor
        return value, next_value.masked_fill_(torch.as_tensor(storage.terminated), 0.0)


def _final_value(storage: Storage, policy: ActorCritic, t: int, memory: Memory) -> Tensor:
    """(N,) values of the true successors of step t, with which N episodes ended."""
    _, ended, obs = storage.ends[-1]
    never = ended < 0
    inputs = obs, never, storage.action[t][ended], storage.reward[t][ended], never
    return policy.bootstrap_value(inputs, tuple(leaf[ended] for leaf in memory))


BLOCK_STEPS = 64
"""Steps that storage and noise are made for at first, where episodes may end early."""

INPUTS = ("obs", "reset", "previous_action", "previous_reward", "previous_done")
"""The arrays (B, ...) that a step starts from, by their names in checkpoints."""
