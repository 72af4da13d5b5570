"""Gradient steps on minibatches of columns, and what a policy is shown in them.

A batch is tensors (T, B, ...) by name. Minibatches are whole columns; for a policy without memory
every step is a column of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.team import Team, divisible, one_thread
from dmrl_ray.arrays import permutation
from dmrl_ray.policy import ActorCritic, Previous, previous_inputs
from dmrl_ray.types import Rollout

Batch: TypeAlias = dict[str, Tensor]
Loss: TypeAlias = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a minibatch, and what to report of it."""

PREVIOUS = ("previous_action", "previous_reward", "previous_done")


def step_through(
    algorithm: Algorithm, batch: Batch, loss: Loss, *, epochs: int, minibatches: int
) -> dict[str, float]:
    """Pass over a batch in random minibatches, a gradient step on each.

    Of several learners each takes its share of every minibatch, and deals it to its threads.

    Args:
        loss: the mean over a minibatch's columns of what each of them says by itself.

    Returns:
        Means over all steps of what `loss` reports, and of ``grad_norm``.
    """
    first = next(iter(batch.values()))
    columns, rank, world_size = first.shape[1], algorithm.rank, algorithm.world_size
    count = min(minibatches, columns)
    bounds = [columns * i // count for i in range(count + 1)]
    team = algorithm.team if divisible(algorithm.policy) else Team(1)
    steps = []
    with one_thread() if team.size > 1 else nullcontext():
        for _ in range(epochs):
            order = permutation(algorithm.rng, columns, first.device)
            for start, stop in pairwise(bounds):
                mine = order[start + rank : stop : world_size]
                minibatch = {name: x.index_select(1, mine) for name, x in batch.items()}
                names, report, gradients = _differentiate(
                    algorithm, team, minibatch, loss, world_size * len(mine) / (stop - start)
                )
                norm = algorithm.descend(algorithm.parameters, gradients)
                steps.append(torch.cat([report, norm.detach().view(1)]))
    return dict(zip([*names, "grad_norm"], torch.stack(steps).mean(0).tolist(), strict=True))


def _differentiate(
    algorithm: Algorithm, team: Team, batch: Batch, loss: Loss, weight: float
) -> tuple[list[str], Tensor, list[Tensor | None]]:
    """Names and means of what the loss reports of a minibatch, and `weight` x its gradients."""
    first = next(iter(batch.values()))
    steps, columns = first.shape[:2]
    device, precision = first.device.type, algorithm.precision

    def of_share(share: slice) -> tuple[list[str], Tensor, tuple[Tensor | None, ...]]:
        part = (share.stop - share.start) / max(1, columns)
        exact = precision == torch.float32
        with nullcontext() if exact else torch.autocast(device, precision):
            value, report = loss({name: x[:, share] for name, x in batch.items()})
        value = value * (weight * part)
        gradients = torch.autograd.grad(value, algorithm.parameters, allow_unused=True)
        return list(report), torch.stack([x.detach() for x in report.values()]) * part, gradients

    answers = team.map(of_share, team.shares(columns, steps))
    names, means, gradients = zip(*answers, strict=True)
    return names[0], torch.stack(means).sum(0), [_sum(g) for g in zip(*gradients, strict=True)]


def _sum(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return reduce(torch.add, known) if known else None


def shown(policy: ActorCritic, rollout: Rollout) -> Batch:
    """What the policy was shown at each step, and where its memory was reset within."""
    batch: Batch = {"obs": rollout.obs[:-1]}
    if policy.sees_previous:
        batch |= dict(zip(PREVIOUS, previous_inputs(rollout), strict=True))
    if policy.recurrent and rollout.reset_state[1:].any():
        batch["reset"] = rollout.reset_state
    return batch


def in_columns(policy: ActorCritic, batch: Batch) -> Batch:
    """The batch, with every step a column of its own if the policy has no memory."""
    if policy.recurrent:
        return batch
    return {name: x.flatten(0, 1).unsqueeze(0) for name, x in batch.items()}


def previous_in(batch: Batch) -> Previous | None:
    """The previous steps in a batch, if the policy is shown them."""
    if PREVIOUS[0] not in batch:
        return None
    action, reward, done = (batch[name] for name in PREVIOUS)
    return action, reward, done
