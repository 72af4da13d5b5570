"""One policy under parameters of each task's own: a leading task axis instead of a loop over tasks.

per_task          the policy's parameters, once for each task
task_pi           what the policies of all tasks do at the steps of a rollout
task_gradients    of every task's loss, by its own parameters
task_actor        acts in a sampler, each environment with the parameters of its task
TaskOptimizer     moves the parameters of each task by themselves
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from dmrl_ray.backend import as_kind_of
from dmrl_ray.losses.averages import standardized
from dmrl_ray.losses.policy_gradient import likelihood_ratio_loss
from dmrl_ray.losses.returns import (
    generalized_advantage,
    linear_baseline,
    trial_advantage,
)
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, previous_inputs
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Actor
from dmrl_ray.types import Array, Rollout

Parameters: TypeAlias = dict[str, Tensor]
"""Parameters of the actor by name; every leaf is (N, ...) with one entry per task."""


ACTOR = ("encoder.", "policy_head.", "context")
"""Prefixes of the parameters that act; the rest belongs to critics and training."""

Recordings: TypeAlias = dict[tuple[int, ...], Callable[..., Tensor]]
"""A policy's operations under many parameters, by the shapes that they are for."""


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


def task_forward(
    policy: ActorCritic,
    params: Parameters,
    obs: Tensor,
    previous: Previous | None,
    memory: Memory,
    reset: Tensor | None,
    buffers: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Memory]:
    """`ActorCritic.forward` of every task under its own parameters (N, ...).

    Args:
        policy: with an encoder in plain operations (`Encoder.use_plain_operations`).
        params: of each task.
        obs: (T, B, ...), as all others with the columns of a task side by side.
        previous: (T, B, ...) each; None where the policy does not see it.
        memory: leaves (B, ...).
        reset: (T, B) bool or None.
        buffers: instead of the policy's own.

    Returns:
        Distribution parameters (T, N, E, P) and the memory after the last step, leaves (B, ...).
    """

    def one_task(parameters: Parameters, *inputs: Any) -> tuple[Tensor, Memory]:
        pi, _, memory = functional_call(policy, (parameters, buffers or {}), inputs)
        return pi, memory

    inputs = (
        by_task(obs, params),
        None if previous is None else tuple(by_task(x, params) for x in previous),
        tuple(by_task(leaf.unsqueeze(0), params)[0] for leaf in memory),
        None if reset is None else by_task(reset, params),
    )
    dims = (
        0,
        1,
        None if previous is None else 1,
        0 if memory else None,
        None if reset is None else 1,
    )
    pi, memory = vmap(one_task, in_dims=dims, out_dims=(1, 0))(params, *inputs)
    return pi, tuple(leaf.flatten(0, 1) for leaf in memory)


def task_pi(policy: ActorCritic, params: Parameters, rollout: Rollout) -> Tensor:
    """(T, N, E, P) distribution parameters at a rollout's steps: N tasks with E columns each."""
    previous = previous_inputs(rollout) if policy.sees_previous else None
    reset = rollout.reset if policy.recurrent else None
    obs, memory = rollout.obs[:-1], rollout.initial_memory
    return task_forward(policy, params, obs, previous, memory, reset)[0]


def task_log_prob(policy: ActorCritic, params: Parameters, rollout: Rollout) -> Tensor:
    """(T, N, E) log-probabilities of a rollout's actions: N tasks with E columns each."""
    pi = task_pi(policy, params, rollout)
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
    acted, advantage = (by_task(x, params) for x in (rollout.log_prob, rollout.advantage))
    mask = task_mask([rollout], params)
    # Tasks do not share these parameters, so the gradient of the sum holds every task's own.
    loss = likelihood_ratio_loss(log_prob, acted, advantage, mask=mask, dim=(0, 2)).sum()
    gradients = torch.autograd.grad(
        loss, [params[name] for name in moving], create_graph=create_graph
    )
    return dict(zip(moving, gradients, strict=True))


def fitted_advantage(
    rollouts: list[Rollout], num_tasks: int, *, gamma: float, gae_lambda: float
) -> Array:
    """(T, B) advantages of the last rollout over a linear baseline, standardised.

    Baseline and scale are fitted per task to all the rollouts given, which must follow upon one
    another. A fitted baseline knows nothing beyond a time limit, so returns end where episodes
    do. An episode that the last rollout cuts has no return yet: the baseline is fitted without it,
    and stands for what comes after the cut; before any episode of a task has ended, returns end
    at the cut. Images are no features for it; there it sees the time alone.
    """
    shape = (-1, num_tasks, rollouts[0].num_envs // num_tasks)
    obs, reward, done, mask = (
        torch.cat([torch.as_tensor(part) for part in parts])
        for parts in zip(
            *((r.obs[:-1], r.reward, r.terminated | r.truncated, r.mask) for r in rollouts),
            strict=True,
        )
    )
    reward, done = reward.reshape(shape), done.reshape(shape)
    counted = None if all(r.all_count for r in rollouts) else mask.reshape(shape)
    cut = ~done[-1] if counted is None else ~done[-1] & counted[-1]  # (N, E)
    fitted, bootstrapped = counted, cut & done.any(0).any(-1, keepdim=True)
    if bootstrapped.any():
        complete = done.flip(0).cummax(0).values.flip(0) | ~bootstrapped
        fitted = complete if counted is None else complete & counted
        # A row of what follows the cut, whose value counts and which is not fitted.
        obs = torch.cat([obs, torch.as_tensor(rollouts[-1].obs[-1:])])
        extra = torch.zeros_like(done[:1])
        reward, done, fitted = (torch.cat([x, extra.to(x.dtype)]) for x in (reward, done, fitted))
    features = obs.reshape(*reward.shape, -1)
    if obs.dtype == torch.uint8:
        features = torch.zeros_like(reward).unsqueeze(-1)
    value = linear_baseline(features, reward, done, gamma=gamma, mask=fitted)
    last_value = torch.zeros_like(value[:1])
    if bootstrapped.any():
        last_value = value[-1:] * bootstrapped
        value, reward, done = value[:-1], reward[:-1], done[:-1]
    advantage = generalized_advantage(
        reward,
        value,
        torch.cat([value[1:], last_value]),
        done,
        torch.zeros_like(done),
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    standard = standardized(advantage, counted, dim=(0, 2))
    last = standard[-rollouts[-1].num_steps :].flatten(1)
    return as_kind_of(rollouts[-1].reward, last)


def trial_advantages(rollouts: list[Rollout], *, gamma: float, gae_lambda: float) -> list[Tensor]:
    """(T, B) advantages of each rollout of trials that go on, with returns to the trials' end.

    The baseline is fitted to all tasks together. It sees the time and what a trial has paid so
    far, also for each step that is left: most of what returns differ by is how good a task is.
    """
    reward, mask = (torch.cat(x) for x in zip(*((r.reward, r.mask) for r in rollouts), strict=True))
    counted = None if all(r.all_count for r in rollouts) else mask
    if counted is not None:
        reward = reward * mask
    steps = torch.arange(len(reward), device=reward.device).unsqueeze(-1)
    paid = (reward.cumsum(0) - reward) / steps.clamp_min(1)
    features = torch.stack([paid, paid * (1 - steps / len(reward))], -1)
    open_end = torch.zeros_like(reward, dtype=torch.bool)
    value = linear_baseline(
        features.unsqueeze(1),
        reward.unsqueeze(1),
        open_end.unsqueeze(1),
        gamma=gamma,
        mask=None if counted is None else counted.unsqueeze(1),
    ).squeeze(1)
    advantage = trial_advantage(reward, value, gamma=gamma, gae_lambda=gae_lambda, mask=counted)
    advantage = standardized(advantage, counted)
    return list(torch.split(advantage, [rollout.num_steps for rollout in rollouts]))


def task_mask(rollouts: Sequence[Rollout], params: Parameters) -> Tensor | None:
    """(T, N, E) steps that count, of rollouts one after the other; None is all."""
    if all(rollout.all_count for rollout in rollouts):
        return None
    return torch.cat([by_task(rollout.mask, params) for rollout in rollouts])


def by_task(x: Tensor, params: Parameters) -> Tensor:
    """(T, B, ...) to (T, N, E, ...): the columns of a task are contiguous."""
    num_tasks = number_of_tasks(params)
    steps, columns, *rest = x.shape
    return x.reshape(steps, num_tasks, columns // num_tasks, *rest)


def number_of_tasks(params: Parameters) -> int:
    """N."""
    return next(iter(params.values())).shape[0]


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


@dataclass(frozen=True)
class Descending:
    """Parameters of each task in the middle of their optimisation."""

    params: Parameters
    first: Parameters = field(default_factory=dict)  # Adam's moments, empty before the first step
    second: Parameters = field(default_factory=dict)
    steps: int = 0


@dataclass(frozen=True)
class TaskOptimizer:
    """Steps of every task at once.

    Attributes:
        kind: how gradients move the parameters.
        rate: step size of the parameter of a name.
        weight_decay: decoupled with adamw, else an L2 penalty.
        eps: added to the root of Adam's second moment.
        max_grad_norm: a task's gradients longer than this, all parameters taken together, are
            shortened to it; None leaves them.
    """

    kind: Literal["sgd", "adam", "adamw"]
    rate: Callable[[str], float]
    weight_decay: float = 0.0
    eps: float = 1e-8
    max_grad_norm: float | None = None

    @torch.no_grad()
    def step(self, state: Descending, gradients: Parameters) -> Descending:
        """One step of the parameters that have gradients."""
        if self.max_grad_norm is not None:
            gradients = shortened(gradients, self.max_grad_norm)
        params, first, second = dict(state.params), dict(state.first), dict(state.second)
        steps = state.steps + 1
        for name, gradient in gradients.items():
            decay = self.weight_decay * params[name]
            direction = gradient if self.kind == "adamw" else gradient + decay
            if self.kind != "sgd":
                zero = torch.zeros_like(gradient)
                first[name] = first.get(name, zero).lerp(direction, 0.1)
                second[name] = second.get(name, zero).lerp(direction.square(), 0.001)
                scale = (second[name] / (1 - 0.999**steps)).sqrt() + self.eps
                direction = first[name] / (1 - 0.9**steps) / scale
            if self.kind == "adamw":
                direction = direction + decay
            params[name] = params[name] - self.rate(name) * direction
        return Descending(params, first, second, steps)


def shortened(gradients: Parameters, longest: float) -> Parameters:
    """Each task's gradient, no longer than this over all its parameters."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    share: Tensor = (longest / (square.sqrt() + 1e-6)).clamp(max=1.0)  # (N,)
    return {name: g * share.reshape(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
