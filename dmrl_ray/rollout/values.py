"""Values of what a rollout passed through, for the whole rollout at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmrl_ray.networks.actor_critic import ActorCritic, mask_previous, previous_inputs
from dmrl_ray.networks.base import Memory
from dmrl_ray.types import Array, Rollout


@dataclass(frozen=True)
class Carried:
    """What a policy is shown of the past at the step after a rollout's last one."""

    memory: Memory
    previous: tuple[Array, Array, Array]  # action, reward, done: (B, ...)
    reset: Array  # (B,) bool


def values(
    policy: ActorCritic,
    rollout: Rollout,
    features: Tensor | None,
    peeks: list[Tensor],
    carried: Carried,
    memory_spans_trial: bool,
) -> tuple[Tensor, Tensor]:
    """V(obs) and, unless memory spans the trial, V(true successor): (T, B) in units of return.

    Args:
        policy: whose values they are.
        rollout: acted, without values yet; of arrays or tensors.
        features: (T, B, H) of the actor, where the critic shares its encoder.
        peeks: `bootstrap_value` of every step at which an episode ended, for policies with memory.
        carried: into the step after the last.
        memory_spans_trial: True where returns run to the end of the trial, which needs no
            successor's value.
    """
    rollout = rollout.map(torch.as_tensor)
    obs = rollout.obs
    if memory_spans_trial:
        previous = previous_inputs(rollout) if policy.sees_previous else None
        whole = policy.value(features, obs[:-1], previous, rollout.reset)
        value = policy.denormalize_value(whole)
        return value, torch.zeros_like(value)
    if policy.recurrent:
        last = _last_value(policy, obs[-1:], carried)
        final = torch.cat(peeks) if peeks else last[:0]
    else:
        rows = torch.cat([obs[-1], rollout.final_obs])
        both = policy.value(None, rows.unsqueeze(0))[0]
        last, final = both[: rollout.num_envs], both[rollout.num_envs :]
    value, end, successor = (
        policy.denormalize_value(v) for v in (policy.value(features, obs[:-1]), last, final)
    )
    next_value = torch.cat([value[1:], end.unsqueeze(0)])
    next_value[rollout.final_step, rollout.final_env] = successor
    return value, next_value.masked_fill_(rollout.terminated, 0.0)


def bootstrap_value(
    policy: ActorCritic, final_obs: Tensor, action: Tensor, reward: Tensor, memory: Memory
) -> Tensor:
    """Values of what N episodes ended with, with the memory of that moment.

    Args:
        policy: whose values they are.
        final_obs: (N, *obs_shape), as all others of the columns whose episodes ended.
        action: (N, *action_shape), the last.
        reward: (N,), the last.
        memory: leaves (N, ...), after the step that ended them.
    """
    obs = final_obs.unsqueeze(0)
    nothing = torch.zeros_like(reward, dtype=torch.bool)
    previous = (action.unsqueeze(0), reward.unsqueeze(0), nothing.unsqueeze(0))
    _, features, _ = policy(obs, previous, memory, None)
    return policy.value(features, obs)[0]


def _last_value(policy: ActorCritic, obs: Tensor, carried: Carried) -> Tensor:
    """V of the observation after the last step, with the memory of that moment."""
    reset = torch.as_tensor(carried.reset[None])
    action, reward, done = (torch.as_tensor(x[None]) for x in carried.previous)
    previous = mask_previous(action, reward, done, reset)
    _, features, _ = policy(obs, previous, carried.memory, reset)
    return policy.value(features, obs)[0]
