"""Values of what a rollout passed through, for the whole rollout at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.buffers import Buffers
from dmrl_ray.networks.base import Memory
from dmrl_ray.policy import ActorCritic, mask_previous, previous_inputs
from dmrl_ray.types import Rollout


@dataclass(frozen=True)
class Carried:
    """What a policy is shown of the past at the step after a rollout's last one."""

    memory: Memory
    previous: tuple[np.ndarray, np.ndarray, np.ndarray]  # action, reward, done: (B, ...)
    reset: np.ndarray  # (B,) bool


def values(
    policy: ActorCritic,
    rollout: Rollout,
    features: Tensor | None,
    peeks: list[Tensor],
    carried: Carried,
    memory_spans_trial: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """V(obs) and, unless memory spans the trial, V(true successor): (T, B) in units of return.

    Args:
        policy: whose values they are.
        rollout: acted, without values yet.
        features: (T, B, H) of the actor, where the critic shares its encoder.
        peeks: `peek_value` of every step at which an episode ended, for policies with memory.
        carried: into the step after the last.
        memory_spans_trial: True where returns run to the end of the trial, which needs no
            successor's value.
    """
    obs = torch.from_numpy(rollout.obs)
    if memory_spans_trial:
        tensors = rollout.map(torch.from_numpy)
        previous = previous_inputs(tensors) if policy.sees_previous else None
        whole = policy.value(features, obs[:-1], previous, tensors.reset_state)
        value = policy.denormalize_value(whole).numpy()
        return value, np.zeros_like(value)
    if policy.recurrent:
        last = _last_value(policy, obs[-1:], carried)
        final = torch.cat(peeks) if peeks else last[:0]
    else:
        rows = torch.cat([obs[-1], torch.from_numpy(rollout.final_obs)])
        both = policy.value(None, rows.unsqueeze(0))[0]
        last, final = both[: rollout.num_columns], both[rollout.num_columns :]
    value, end, successor = (
        policy.denormalize_value(v).numpy() for v in (policy.value(features, obs[:-1]), last, final)
    )
    next_value = np.concatenate([value[1:], end[None]])
    next_value[rollout.final_step, rollout.final_column] = successor
    next_value[rollout.terminated] = 0.0
    return value, next_value


def peek_value(policy: ActorCritic, buffers: Buffers, t: int, memory: Memory) -> Tensor:
    """Values of the final observations of step t, with the memory of that moment."""
    columns = torch.from_numpy(buffers.final_column[-1])
    obs = torch.from_numpy(buffers.final_obs[-1]).unsqueeze(0)
    action, reward = (torch.from_numpy(x[t : t + 1]) for x in (buffers.action, buffers.reward))
    nothing = torch.zeros(1, len(columns), dtype=torch.bool)
    previous = (action[:, columns], reward[:, columns], nothing)
    _, features, _ = policy(obs, previous, tuple(leaf[columns] for leaf in memory), None)
    return policy.value(features, obs)[0]


def _last_value(policy: ActorCritic, obs: Tensor, carried: Carried) -> Tensor:
    """V of the observation after the last step, with the memory of that moment."""
    reset = torch.from_numpy(carried.reset[None])
    action, reward, done = (torch.from_numpy(x[None]) for x in carried.previous)
    previous = mask_previous(action, reward, done, reset)
    _, features, _ = policy(obs, previous, carried.memory, reset)
    return policy.value(features, obs)[0]
