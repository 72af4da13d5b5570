"""One policy under many parameters: a leading task axis instead of a loop over tasks."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor
from torch.func import functional_call, vmap

from dmrl_ray.networks import Memory
from dmrl_ray.policy import ActorCritic, Previous
from dmrl_ray.rollout import Actor

Parameters: TypeAlias = dict[str, Tensor]
"""Parameters of the actor by name; every leaf is (N, ...) with one entry per task."""


def per_task(policy: ActorCritic, num_tasks: int) -> Parameters:
    """The actor's parameters, seen once per task: (N, ...) without a copy."""
    return {
        name: parameter.unsqueeze(0).expand(num_tasks, *parameter.shape)
        for name, parameter in policy.named_parameters()
        if name.startswith(("encoder.", "policy_head."))
    }


def task_policy(policy: ActorCritic, params: Parameters, obs: Tensor) -> Tensor:
    """Distribution parameters (T, N, E, P) of observations (T, N, E, ...) under (N, ...)."""

    def one_task(parameters: Parameters, task_obs: Tensor) -> Tensor:
        pi: Tensor = functional_call(policy, parameters, (task_obs,))[0]
        return pi

    return vmap(one_task, in_dims=(0, 1), out_dims=1)(params, obs)


def task_actor(policy: ActorCritic, params: Parameters) -> Actor:
    """An actor in which every task's columns act with that task's parameters."""

    def act(
        obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        pi = task_policy(policy, params, by_task(obs, params)).flatten(1, 2)
        return pi, pi, ()

    return act


def by_task(x: Tensor, params: Parameters) -> Tensor:
    """(T, B, ...) to (T, N, E, ...): the columns of a task are contiguous."""
    num_tasks = next(iter(params.values())).shape[0]
    steps, columns, *rest = x.shape
    return x.reshape(steps, num_tasks, columns // num_tasks, *rest)
