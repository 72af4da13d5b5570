"""Rollouts on a device: environments, policy and storage are tensors there, and so is the rollout.

During a rollout the host only enqueues work and never synchronises with the device. It knows when
episodes end, as all of them have one length, and fetches their statistics once, at the end.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.backend import TensorStream, host
from dmrl_ray.rollout.finite import check_finite, diverged
from dmrl_ray.rollout.sampler import Sampler, Storage
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of
from dmrl_ray.types import Array


class DeviceSampler(Sampler):
    """A `Sampler` on a device; its rollouts are of tensors.

    Noise is drawn on the device, by generators whose seeds come from the stream of the collection.
    It asks no expert, and the time spent in environments and policy is that of the host's clock,
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
        self._envs = torch.arange(num_envs, device=device)
        self._success: list[tuple[int, Tensor]] = []  # step, and whether it was one, (B,)

    def _put(self, x: Array) -> Tensor:
        return torch.as_tensor(x, device=self.device)

    def _stream(self, rng: np.random.Generator) -> TensorStream:
        return TensorStream(rng, self.device)

    def _step_env(self, storage: Storage, t: int) -> Array | None:
        """Step all environments; returns all of them where their episodes ended, or None."""
        assert storage.expert_envs is None
        began = perf_counter()
        action = storage.action[t]
        if not self._discrete:
            action = action.clamp(-1.0, 1.0)
        obs, reward, terminated, truncated, info = answer_of(
            self.distribution, self.env.step, action
        )
        storage.obs[t + 1] = obs
        storage.reward[t] = reward
        self.env_s += perf_counter() - began
        if "success" in info:
            self._success.append((t, info["success"]))
        if "final_obs" not in info:
            return None
        storage.terminated[t] = terminated
        storage.truncated[t] = truncated
        storage.done[t] = terminated | truncated
        storage.ends.append((t, self._envs, info["final_obs"]))
        return self._envs

    def _check(self, storage: Storage, pi: Tensor) -> None:
        """Record the episodes that ended and check all numbers, from one answer of the device."""
        ends = [t + 1 for t, _, _ in storage.ends[1:]]
        spans = [*pairwise([0, *ends, storage.num_steps])]
        returns = [storage.reward[start:stop].sum(0, dtype=torch.float64) for start, stop in spans]
        steps = [[s for t, s in self._success if start <= t < stop] for start, stop in spans]
        self._success = []
        success = [torch.stack(s).any(0).double() for s in steps if s]
        total = storage.obs.sum() + storage.final_obs.sum() + storage.reward.sum()
        sums = [x.double().expand(self.num_envs) for x in (total, pi.sum())]
        *rows, totals, pi_sums = host(torch.stack([*returns, *success, *sums]))
        successes = iter(rows[len(spans) :])
        for i, (start, stop) in enumerate(spans):
            self.episodes.add_reward(rows[i], stop - start)
            if steps[i]:
                self.episodes.add_success(next(successes))
            if i < len(ends):
                envs, step = np.arange(self.num_envs), self._steps_done + stop
                self.episodes.end_episodes(envs, step, self._pending_task_of, greedy=storage.greedy)
        if not np.isfinite(pi_sums[0]) and self._diverged_first(storage, pi):
            raise diverged(self.policy_version, storage.adaptation_step)
        if not np.isfinite(totals[0]):
            check_finite(self.distribution, storage, self.episodes, self._steps_done)

    def _diverged_first(self, storage: Storage, pi: Tensor) -> bool:
        """Whether the policy's answer is not finite before anything that it observed is not."""
        step = int((~torch.isfinite(pi)).flatten(1).any(1).int().argmax())
        before = storage.obs[: step + 1].sum() + storage.reward[:step].sum()
        return bool(torch.isfinite(before))
