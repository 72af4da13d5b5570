"""One policy under many parameters: a leading task axis instead of a loop over tasks."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, vmap

from dmrl_ray.losses.returns import generalized_advantage, linear_baseline
from dmrl_ray.networks.base import Memory
from dmrl_ray.policy import ActorCritic, Previous
from dmrl_ray.rollout import Actor
from dmrl_ray.types import Rollout

Parameters: TypeAlias = dict[str, Tensor]
"""Parameters of the actor by name; every leaf is (N, ...) with one entry per task."""


ACTOR = ("encoder.", "policy_head.", "context")
"""Prefixes of the parameters that act; the rest belongs to critics and training."""


def per_task(policy: ActorCritic, num_tasks: int) -> Parameters:
    """The actor's parameters, seen once per task: (N, ...) without a copy.

    A parameter that is frozen for the outer loop can still move within a task.
    """
    seen = {
        name: parameter.unsqueeze(0).expand(num_tasks, *parameter.shape)
        for name, parameter in policy.named_parameters()
        if name.startswith(ACTOR)
    }
    return {name: p if p.requires_grad else p.requires_grad_() for name, p in seen.items()}


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


def task_log_prob(policy: ActorCritic, params: Parameters, rollout: Rollout) -> Tensor:
    """(T, N, E) log-probabilities of a rollout's actions: N tasks with E columns each."""
    pi = task_policy(policy, params, by_task(rollout.obs[:-1], params))
    return policy.policy_head.log_prob(pi, by_task(rollout.action, params))


def task_gradients(
    policy: ActorCritic,
    params: Parameters,
    rollout: Rollout,
    moving: list[str],
    *,
    create_graph: bool,
) -> Parameters:
    """Every task's policy gradient, negated, with respect to its own parameters `moving`.

    The surrogate is importance-weighted (`likelihood_ratio_loss`), so that the gradient stays
    right under parameters other than those that acted.
    """
    log_prob = task_log_prob(policy, params, rollout)
    ratio = (log_prob - by_task(rollout.log_prob, params)).exp()
    # Tasks do not share these parameters, so the gradient of the sum holds every task's own.
    loss = -(ratio * by_task(rollout.advantage, params)).mean((0, 2)).sum()
    gradients = torch.autograd.grad(
        loss, [params[name] for name in moving], create_graph=create_graph
    )
    return dict(zip(moving, gradients, strict=True))


def fitted_advantage(
    rollout: Rollout, num_tasks: int, *, gamma: float, gae_lambda: float
) -> np.ndarray:
    """(T, B) advantages over a linear baseline fitted per task, standardised per task.

    A fitted baseline knows nothing beyond a time limit, so returns end where episodes do.
    """
    shape = (rollout.num_steps, num_tasks, rollout.num_columns // num_tasks)
    obs = torch.from_numpy(rollout.obs[:-1]).reshape(*shape, -1)
    reward = torch.from_numpy(rollout.reward).reshape(shape)
    done = torch.from_numpy(rollout.terminated | rollout.truncated).reshape(shape)
    value = linear_baseline(obs, reward, done, gamma=gamma)
    advantage = generalized_advantage(
        reward,
        value,
        torch.cat([value[1:], torch.zeros_like(value[:1])]),
        done,
        torch.zeros_like(done),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    mean = advantage.mean((0, 2), keepdim=True)
    std = advantage.std((0, 2), keepdim=True)
    return ((advantage - mean) / (std + 1e-8)).flatten(1).numpy()


def by_task(x: Tensor, params: Parameters) -> Tensor:
    """(T, B, ...) to (T, N, E, ...): the columns of a task are contiguous."""
    num_tasks = next(iter(params.values())).shape[0]
    steps, columns, *rest = x.shape
    return x.reshape(steps, num_tasks, columns // num_tasks, *rest)
