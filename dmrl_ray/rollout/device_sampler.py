"""Rollouts on a device: environments, policy and storage are tensors there, and so is the rollout.

While one lasts, the host says what to do next and asks for nothing: every answer would have to wait
for all the work queued before it. It need not ask when episodes end, because all of them have one
length. What the books need to know of them is fetched once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.backend import TensorStream, host
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, mask_previous
from dmrl_ray.rollout.finite import check_finite, diverged
from dmrl_ray.rollout.sampler import STATE, Actor, Sampler
from dmrl_ray.rollout.values import Carried, bootstrap_value, values
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of
from dmrl_ray.types import Array, Arrays, Rollout, Task


class DeviceSampler(Sampler):
    """A `Sampler` on a device; its rollouts are of tensors.

    Noise is drawn on the device, by generators whose seeds come from the stream of the collection.
    It asks no oracle, and what is spent in environments and policy is told by the host's clock,
    which the device may be behind.

    Args:
        distribution: a family that can be put on a device.
        num_envs: B.
        memory_spans_trial: as `Sampler`.
        device: where to.
    """

    def __init__(
        self,
        distribution: TaskDistribution,
        num_envs: int,
        *,
        memory_spans_trial: bool,
        device: torch.device,
    ) -> None:
        super().__init__(distribution, num_envs, memory_spans_trial=memory_spans_trial)
        self.device = device
        self.env.to_device(device, distribution.max_episode_steps)

    def start(
        self,
        rng: np.random.Generator,
        policy_version: int,
        *,
        greedy: bool = False,
        task_updates: int = 0,
    ) -> None:
        """Begin a collection, as `Sampler.start` does."""
        super().start(rng, policy_version, greedy=greedy, task_updates=task_updates)
        self.env.np_random = TensorStream(self.env.np_random, self.device)
        self._noise = TensorStream(self.rng, self.device)

    def begin_trial(
        self,
        tasks: Sequence[Task],
        policy: ActorCritic,
        episodes: int | None = None,
        *,
        one_agent: bool = False,
    ) -> None:
        """Put every environment at the start of a trial, as `Sampler.begin_trial` does."""
        super().begin_trial(tasks, policy, episodes, one_agent=one_agent)
        self.memory = tuple(leaf.to(self.device) for leaf in self.memory)

    def begin_episodes(self, episodes: int | None = None, *, forget: bool = True) -> None:
        """Reset every environment, as `Sampler.begin_episodes` does."""
        super().begin_episodes(episodes, forget=forget)
        self._move()

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        super().set_state(state)
        if state:
            self.memory = tuple(leaf.to(self.device) for leaf in self.memory)
            self._move()

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
        """Act in every environment, as `Sampler.rollout` does."""
        assert beta is None
        greedy = self._greedy if greedy is None else greedy
        num_steps = self._most_steps(num_steps)
        self.episodes.adapted(None if self.memory_spans_trial else adaptation_step)
        rollout = self._storage(num_steps, adaptation_step)
        with torch.no_grad():
            acted = _Acted(num_steps)
            self._act_on(rollout, acted, policy, actor or policy, greedy, with_value)
            began = perf_counter()
            assert acted.pi is not None
            rollout.log_prob = policy.policy_head.log_prob(acted.pi, rollout.action)
            self._end(rollout, acted)
            if with_value:
                rollout.value, rollout.next_value = values(
                    policy,
                    rollout,
                    acted.features,
                    acted.peeks,
                    Carried(self.memory, self._before(), self._tensor(self._reset)),
                    self.memory_spans_trial,
                )
            self.inference_s += perf_counter() - began
        self._count_episodes(rollout, acted, greedy=greedy)
        self._steps_done += num_steps
        self.fresh = False
        return rollout

    def _act_on(
        self,
        rollout: Rollout,
        acted: _Acted,
        policy: ActorCritic,
        actor: Actor,
        greedy: bool,
        with_value: bool,
    ) -> None:
        """The loop over steps."""
        head = policy.policy_head
        num_steps, columns = rollout.num_steps, self.num_envs
        noise = None if greedy else head.noise(self._noise, num_steps, columns)
        keep_features = with_value and policy.value_encoder is None
        peek = with_value and policy.recurrent and not self.memory_spans_trial
        memory, reset = self.memory, bool(self._reset[0])
        began = perf_counter()
        for t in range(num_steps):
            if reset:
                rollout.reset[t] = True
                memory = tuple(torch.zeros_like(leaf) for leaf in memory)
            previous = self._previous(rollout, t, reset) if policy.sees_previous else None
            pi, feature, memory = actor(rollout.obs[t : t + 1], previous, memory, None)
            rollout.action[t] = head.mode(pi[0]) if noise is None else head.sample(pi[0], noise[t])
            acted.keep(t, pi, feature if keep_features else None)
            final_obs = self._step_on(rollout, acted, t)
            if peek and final_obs is not None:
                last = rollout.action[t], rollout.reward[t]
                acted.peeks.append(bootstrap_value(policy, final_obs, *last, memory))
            reset = final_obs is not None and not self.memory_spans_trial
        self.inference_s += perf_counter() - began - acted.env_s
        self.env_s += acted.env_s
        self.memory, self._reset = memory, np.full(columns, reset)

    def _step_on(self, rollout: Rollout, acted: _Acted, t: int) -> Tensor | None:
        """Step all columns; returns what their episodes ended with, if they did."""
        began = perf_counter()
        action = rollout.action[t]
        if not self._discrete:
            action = action.clamp(-1.0, 1.0)
        obs, reward, terminated, truncated, info = answer_of(
            self.distribution, self.env.step, action
        )
        rollout.obs[t + 1] = obs
        rollout.reward[t] = reward
        acted.env_s += perf_counter() - began
        if "success" in info:
            acted.see(info["success"])
        final_obs: Tensor | None = info.get("final_obs")
        if final_obs is not None:
            rollout.terminated[t] = terminated
            rollout.truncated[t] = truncated
            acted.end(t, final_obs)
        return final_obs

    def _previous(self, rollout: Rollout, t: int, reset: bool) -> Previous:
        """Action, reward and done before step t, (1, B, ...), and nothing after a reset."""
        if t == 0:
            action, reward, done = (x.unsqueeze(0) for x in self._before())
        else:
            step = slice(t - 1, t)
            action, reward = rollout.action[step], rollout.reward[step]
            done = rollout.terminated[step] | rollout.truncated[step]
        if not reset:
            return action, reward, done
        return mask_previous(action, reward, done, torch.ones_like(done))

    def _storage(self, num_steps: int, adaptation_step: np.ndarray | int) -> Rollout:
        """A rollout that is still to be filled, but for what went before it."""
        shape = (num_steps, self.num_envs)
        action, reward, done = self._before()
        nothing = reward.new_empty(num_steps, 0)
        no_index = torch.empty(0, dtype=torch.int64, device=self.device)
        obs = self._obs.new_empty(num_steps + 1, *self._obs.shape)
        obs[0] = self._obs
        return Rollout(
            task_index=self._task_index,
            policy_version=self.policy_version,
            adaptation_step=np.full(self.num_envs, adaptation_step),
            obs=obs,
            final_step=no_index,
            final_env=no_index,
            final_obs=obs[0, :0],
            action=action.new_empty(num_steps, *action.shape),
            reward=reward.new_empty(shape),
            terminated=done.new_zeros(shape),
            truncated=done.new_zeros(shape),
            mask=done.new_ones(shape),
            all_count=True,
            reset=done.new_zeros(shape),
            log_prob=nothing,
            value=nothing,
            next_value=nothing,
            advantage=nothing,
            value_target=nothing,
            expert_action=nothing,
            previous_action=action,
            previous_reward=reward,
            previous_done=done,
            initial_memory=self.memory,
        )

    def _end(self, rollout: Rollout, acted: _Acted) -> None:
        """Note the ends of episodes, and what the next rollout starts from."""
        if acted.ends:
            ends = torch.tensor(acted.ends, device=self.device)
            rollout.final_step = ends.repeat_interleave(self.num_envs)
            rollout.final_env = torch.arange(self.num_envs, device=self.device).repeat(len(ends))
            rollout.final_obs = torch.cat(acted.final_obs)
        self._obs = rollout.obs[-1].clone()
        self._previous_action = rollout.action[-1].clone()
        self._previous_reward = rollout.reward[-1].clone()
        self._previous_done = rollout.terminated[-1] | rollout.truncated[-1]

    def _count_episodes(self, rollout: Rollout, acted: _Acted, *, greedy: bool) -> None:
        """Rows of the episodes that ended, from one answer of the device."""
        bounds = [0, *(t + 1 for t in acted.ends), rollout.num_steps]
        columns = np.arange(self.num_envs)
        earned = [
            rollout.reward[start:stop].sum(0, dtype=torch.float64)
            for start, stop in pairwise(bounds)
        ]
        total = rollout.obs.sum() + rollout.final_obs.sum() + rollout.reward.sum()
        assert acted.pi is not None
        sums = [x.double().expand(len(columns)) for x in (total, acted.pi.sum())]
        seen = [*acted.success, *(() if acted.seen is None else (acted.seen,))]
        told = [*earned, *(s.double() for s in seen), *sums]
        *told, totals, acts = host(torch.stack(told))
        successes = told[len(earned) :]
        for i, (start, stop) in enumerate(pairwise(bounds)):
            self.episodes.add(told[i], stop - start)
            if i < len(successes):
                self.episodes.see(successes[i])
            if i < len(acted.ends):
                step = self._steps_done + stop
                self.episodes.end(columns, step, self._pending_task_of, greedy=greedy)
        if np.isnan(acts[0]) and self._diverged_first(rollout, acted.pi):
            raise diverged(rollout.policy_version, rollout.adaptation_step)
        if not np.isfinite(totals[0]):
            check_finite(self.distribution, rollout.map(host), self.episodes, self._steps_done)

    def _diverged_first(self, rollout: Rollout, pi: Tensor) -> bool:
        """Whether the policy's answer is not a number before anything that it was shown is not."""
        step = int(torch.isnan(pi).flatten(1).any(1).int().argmax())
        before = rollout.obs[: step + 1].sum() + rollout.reward[:step].sum()
        return bool(torch.isfinite(before))

    def _before(self) -> tuple[Array, Array, Array]:
        return self._previous_action, self._previous_reward, self._previous_done

    def _tensor(self, x: Array) -> Tensor:
        return torch.as_tensor(x, device=self.device)

    def _move(self) -> None:
        """What goes before the next step, to the device; whether memory is reset stays here."""
        for name in STATE:
            if name != "reset":
                setattr(self, f"_{name}", self._tensor(getattr(self, f"_{name}")))


class _Acted:
    """What is kept of a rollout while it lasts, beside its own arrays."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.pi: Tensor | None = None
        self.features: Tensor | None = None
        self.peeks: list[Tensor] = []
        self.ends: list[int] = []  # steps at which all episodes ended
        self.final_obs: list[Tensor] = []
        self.success: list[Tensor] = []  # of those episodes: whether any step was one
        self.seen: Tensor | None = None  # of the open ones
        self.env_s = 0.0

    def keep(self, t: int, pi: Tensor, features: Tensor | None) -> None:
        """Distribution parameters and features (1, B, ...) of step t."""
        if self.pi is None:
            self.pi = pi.new_empty(self.num_steps, *pi.shape[1:])
        self.pi[t] = pi[0]
        if features is None:
            return
        if self.features is None:
            self.features = features.new_empty(self.num_steps, *features.shape[1:])
        self.features[t] = features[0]

    def see(self, success: Tensor) -> None:
        """Which steps (B,) were a success."""
        self.seen = success if self.seen is None else self.seen | success

    def end(self, t: int, final_obs: Tensor) -> None:
        """All episodes ended at step t."""
        self.ends.append(t)
        self.final_obs.append(final_obs)
        if self.seen is not None:
            self.success.append(self.seen)
            self.seen = None
