"""One policy under parameters of each task's own: a leading task axis instead of a loop over tasks.

    per_task             the policy's parameters, once for each task
    task_pi, trial_pi    distributions of actions at the steps of a rollout, or of several
    surrogate_loss       the policy-gradient loss of each task
    task_gradients       of such losses, each by its task's parameters
    TaskActor            acts in a sampler, each environment with its task's parameters
    descend_over_tasks   outer steps on a mean over tasks
    TaskOptimizer        moves the parameters of each task by themselves

Environments of a task stand side by side: (T, B, ...) of a rollout is (T, N, E, ...) by task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from dmrl_ray.backend import as_kind_of
from dmrl_ray.learn.descent import Descent
from dmrl_ray.learn.gradients import Batch, Loss, Report
from dmrl_ray.losses.policy_gradient import likelihood_ratio_loss
from dmrl_ray.losses.returns import fitted_advantage
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, previous_inputs
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Actor
from dmrl_ray.types import Array, Rollout, Trial

Parameters: TypeAlias = dict[str, Tensor]
"""Parameters of the actor by name; every leaf is (N, ...) with one entry per task."""


ACTOR = ("encoder.", "policy_head.", "context")
"""Prefixes of the parameters that act; the rest belongs to critics and training."""

READ = ("obs", "action", "log_prob", "advantage")
"""Fields of a rollout that losses read under policies without memory, beside the mask."""

TrialLoss: TypeAlias = Callable[..., Tensor]
"""A function of a trial and further tensors (T, B, ...): a scalar, the mean over its tasks."""


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
        obs: (T, B, ...), as all others with the environments of a task side by side.
        previous: (T, B, ...) each; None where the policy does not observe it.
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
    """(T, N, E, P) distributions at a rollout's steps, of N tasks with E environments each."""
    previous = previous_inputs(rollout) if policy.sees_previous else None
    reset = rollout.reset if policy.recurrent else None
    obs, memory = rollout.obs[:-1], rollout.initial_memory
    return task_forward(policy, params, obs, previous, memory, reset)[0]


def task_log_prob(policy: ActorCritic, params: Parameters, rollout: Rollout) -> Tensor:
    """(T, N, E) log-probabilities of a rollout's actions: N tasks with E environments each."""
    pi = task_pi(policy, params, rollout)
    return policy.policy_head.log_prob(pi, by_task(rollout.action, params))


def trial_pi(policy: ActorCritic, params: Sequence[Parameters], trial: Trial) -> Tensor:
    """(T, N, E, P) `task_pi` of rollouts one after the other, each under its own parameters."""
    return torch.cat([task_pi(policy, *pair) for pair in zip(params, trial, strict=True)])


def trial_log_prob(policy: ActorCritic, params: Sequence[Parameters], trial: Trial) -> Tensor:
    """(T, N, E) `task_log_prob` of rollouts one after the other, each under its own parameters."""
    return torch.cat([task_log_prob(policy, *pair) for pair in zip(params, trial, strict=True)])


def surrogate_loss(policy: ActorCritic, params: Parameters, rollout: Rollout) -> Tensor:
    """(N,) policy-gradient losses on a rollout, of each task under its own parameters.

    They are importance-weighted (`likelihood_ratio_loss`), so that their gradients stay right under
    parameters other than those that acted.
    """
    log_prob = task_log_prob(policy, params, rollout)
    behaviour_log_prob, advantage = (
        by_task(x, params) for x in (rollout.log_prob, rollout.advantage)
    )
    mask = task_mask([rollout], params)
    return likelihood_ratio_loss(log_prob, behaviour_log_prob, advantage, mask=mask, dim=(0, 2))


def task_gradients(
    loss: Tensor, params: Parameters, trainable: tuple[str, ...], *, create_graph: bool = False
) -> Parameters:
    """Gradients of losses (N,) of all tasks, each with respect to its task's own parameters.

    Args:
        loss: (N,).
        params: of each task.
        trainable: prefixes of the names that gradients are taken for.
        create_graph: they can be differentiated themselves.
    """
    names = [name for name in params if name.startswith(trainable)]
    # Tasks do not share these parameters, so the gradient of the sum holds every task's own.
    gradients = torch.autograd.grad(
        loss.sum(), [params[name] for name in names], create_graph=create_graph
    )
    return dict(zip(names, gradients, strict=True))


def inner_advantage(
    rollouts: Sequence[Rollout], num_tasks: int, *, gamma: float, gae_lambda: float
) -> Array:
    """(T, B) `fitted_advantage` of the last rollout, given the earlier rollouts of the trial.

    Images are no features of the baseline, which sees the time alone where there are any.
    """
    last = rollouts[-1]
    shape = (-1, num_tasks, last.num_envs // num_tasks)
    reward, done, mask = (
        torch.cat([torch.as_tensor(part) for part in parts]).reshape(shape)
        for parts in zip(
            *((r.reward, r.terminated | r.truncated, r.mask) for r in rollouts), strict=True
        )
    )
    rows = [*(r.obs[:-1] for r in rollouts), last.obs[-1:]]
    obs = torch.cat([torch.as_tensor(part) for part in rows])
    if obs.dtype == torch.uint8:
        obs = torch.zeros(obs.shape[:2], dtype=reward.dtype, device=obs.device)
    advantage = fitted_advantage(
        obs.reshape(len(obs), *reward.shape[1:], -1),
        reward,
        done,
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask=None if all(r.all_count for r in rollouts) else mask,
    )
    return as_kind_of(last.reward, advantage[-last.num_steps :].flatten(1))


def trial_mask(trial: Trial) -> Tensor | None:
    """(T, B) steps that count, of rollouts one after the other; None is all."""
    if all(rollout.all_count for rollout in trial):
        return None
    return torch.cat([rollout.mask for rollout in trial])


def task_mask(trial: Trial, params: Parameters) -> Tensor | None:
    """(T, N, E) the same by task."""
    mask = trial_mask(trial)
    return None if mask is None else by_task(mask, params)


def by_task(x: Tensor, params: Parameters) -> Tensor:
    """(T, B, ...) to (T, N, E, ...): the environments of a task are contiguous."""
    num_tasks = number_of_tasks(params)
    steps, envs, *rest = x.shape
    return x.reshape(steps, num_tasks, envs // num_tasks, *rest)


def number_of_tasks(params: Parameters) -> int:
    """N, of tasks with parameters of their own."""
    return next(iter(params.values())).shape[0]


class TaskActor:
    """Acts in every environment with the parameters of its task.

    Of a policy without memory the operations are recorded once for each shape and replayed from
    then on: dispatch through `vmap` and `functional_call` costs more than the operations.

    Args:
        policy: in evaluation mode when it acts.
    """

    def __init__(self, policy: ActorCritic) -> None:
        self.policy = policy
        self.recordings: dict[tuple[int, ...], Callable[..., Tensor]] = {}

    def under(self, params: Parameters) -> Actor:
        """The actor under these parameters, for a sampler."""
        buffers = dict(self.policy.named_buffers())

        def act(
            obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
        ) -> tuple[Tensor, Tensor, Memory]:
            if memory or previous is not None:
                pi, memory = task_forward(self.policy, params, obs, previous, memory, reset)
            else:
                key = (*obs.shape, number_of_tasks(params))
                if key not in self.recordings:
                    self.recordings[key] = self._record(params, buffers, obs)
                pi = self.recordings[key](params, buffers, obs)
            pi = pi.flatten(1, 2)
            return pi, pi, memory

        return act

    def _record(self, *arguments: Any) -> Callable[..., Tensor]:
        """The operations of `task_forward` without memory."""
        from torch.fx.experimental.proxy_tensor import make_fx  # It takes a while; others do not.

        def forward(params: Parameters, buffers: dict[str, Tensor], obs: Tensor) -> Tensor:
            return task_forward(self.policy, params, obs, None, (), None, buffers)[0]

        recorded: Callable[..., Tensor] = make_fx(forward)(*arguments)
        return recorded


def descend_over_tasks(
    descent: Descent,
    loss: TrialLoss,
    trial: Trial,
    *tensors: Tensor,
    steps: int = 1,
    parts: tuple[str, ...] = ("",),
) -> dict[str, float]:
    """Gradient steps on a mean over tasks, of which each learner has a share.

    Args:
        descent: takes the steps, on the policy that the loss reads.
        loss: of a trial and the further tensors, which have the trial's tasks only.
        trial: of all tasks.
        tensors: (T, B, ...) each, which the loss is given beside the trial.
        steps: number of them.
        parts: prefixes of the names of the parameters that they move.

    Returns:
        ``outer_loss`` and ``grad_norm``, means over the steps.
    """
    share = share_of_tasks(loss, trial, *tensors, rank=descent.rank, world_size=descent.world_size)
    reports = [descent.descend(*share, parts) for _ in range(steps)]
    means = torch.stack([torch.stack(list(report.values())) for report in reports]).mean(0)
    return dict(zip(reports[0], means.tolist(), strict=True))


def share_of_tasks(
    loss: TrialLoss, trial: Trial, *tensors: Tensor, rank: int, world_size: int
) -> tuple[Loss, Batch, float]:
    """The loss of a learner's tasks, the batch that it reads, and its weight among learners.

    The average over learners is the loss of all tasks. With no task left for it, a learner has one
    of weight 0.
    """
    num_tasks = trial[0].num_tasks
    start, stop = (num_tasks * (rank + i) // world_size for i in (0, 1))
    weight = (stop - start) * world_size / num_tasks
    if start == stop:
        start, stop = 0, 1
    own, envs = [r.of_tasks(start, stop) for r in trial], trial[0].envs_of(start, stop)
    read = READ if all(rollout.all_count for rollout in own) else (*READ, "mask")
    batch = {f"{i}.{name}": getattr(r, name) for i, r in enumerate(own) for name in read}
    batch |= {f"given.{i}": x[:, envs] for i, x in enumerate(tensors)}
    # Numbers of tasks are looked up in it, which compilers want to know beforehand.
    task_index = own[0].task_index.cpu().numpy()

    def own_loss(batch: Batch) -> tuple[Tensor, Report]:
        arrays: list[dict[str, Any]] = [
            {name: batch[f"{i}.{name}"] for name in read} for i in range(len(own))
        ]
        rollouts = [
            replace(rollout, task_index=task_index, **given)
            for rollout, given in zip(own, arrays, strict=True)
        ]
        value = loss(rollouts, *(batch[f"given.{i}"] for i in range(len(tensors))))
        return value, {"outer_loss": value}

    return own_loss, batch, weight


@dataclass(frozen=True)
class TaskTrainState:
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
    def step(self, state: TaskTrainState, gradients: Parameters) -> TaskTrainState:
        """One step of the parameters that have gradients."""
        if self.max_grad_norm is not None:
            gradients = clip_by_norm(gradients, self.max_grad_norm)
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
        return TaskTrainState(params, first, second, steps)


def clip_by_norm(gradients: Parameters, longest: float) -> Parameters:
    """Each task's gradient, clipped to this norm over all its parameters."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    share: Tensor = (longest / (square.sqrt() + 1e-6)).clamp(max=1.0)  # (N,)
    return {name: g * share.reshape(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}
