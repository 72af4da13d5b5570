"""Acting under parameters of each task's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from dmrl_ray.learn.task_params import Parameters, number_of_tasks, task_forward
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Actor

Recordings: TypeAlias = dict[tuple[int, ...], Callable[..., Tensor]]
"""A policy's operations under many parameters, by the shapes that they are for."""


def task_actor(policy: ActorCritic, params: Parameters, recordings: Recordings) -> Actor:
    """An actor in which every task's columns act with that task's parameters.

    Of a policy without memory the operations are recorded once and replayed from then on: the way
    to them through `vmap` and `functional_call` takes longer than they do.

    Args:
        policy: in evaluation mode.
        params: of each task.
        recordings: of this policy, by shapes; added to.
    """
    buffers = dict(policy.named_buffers())

    def act(
        obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        if memory or previous is not None:
            pi, memory = task_forward(policy, params, obs, previous, memory, reset)
        else:
            key = (*obs.shape, number_of_tasks(params))
            if key not in recordings:
                recordings[key] = _recorded(policy, params, buffers, obs)
            pi = recordings[key](params, buffers, obs)
        pi = pi.flatten(1, 2)
        return pi, pi, memory

    return act


def _recorded(policy: ActorCritic, *arguments: Any) -> Callable[..., Tensor]:
    """The operations of `task_forward` without memory, of parameters, buffers and observations."""
    from torch.fx.experimental.proxy_tensor import make_fx  # It takes a while, and others do not.

    def forward(params: Parameters, buffers: dict[str, Tensor], obs: Tensor) -> Tensor:
        return task_forward(policy, params, obs, None, (), None, buffers)[0]

    recorded: Callable[..., Tensor] = make_fx(forward)(*arguments)
    return recorded
