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
            order = torch.from_numpy(algorithm.rng.permutation(columns)).to(first.device)
            shuffled = {name: x.index_select(1, order) for name, x in batch.items()}
            for start, stop in pairwise(bounds):
                mine = range(start + rank, stop, world_size)
                names, report, gradients = _differentiate(
                    algorithm, team, shuffled, loss, mine, world_size / (stop - start)
                )
                norm = algorithm.descend(algorithm.parameters, gradients)
                steps.append(torch.cat([report, norm.detach().view(1)]))
    return dict(zip([*names, "grad_norm"], torch.stack(steps).mean(0).tolist(), strict=True))


def _differentiate(
    algorithm: Algorithm, team: Team, batch: Batch, loss: Loss, mine: range, weight: float
) -> tuple[list[str], Tensor, list[Tensor | None]]:
    """Names and means of what the loss reports of these columns, and `weight` x their gradients."""

    def of_share(share: range) -> tuple[list[str], Tensor, tuple[Tensor | None, ...]]:
        part = slice(share.start, share.stop, share.step)
        value, report = loss({name: x[:, part] for name, x in batch.items()})
        value = value * (weight * len(share))
        gradients = torch.autograd.grad(value, algorithm.parameters, allow_unused=True)
        means = torch.stack([x.detach() for x in report.values()])
        return list(report), means * (len(share) / max(1, len(mine))), gradients

    names, means, gradients = zip(
        *team.map(of_share, team.shares(mine, _steps(batch))), strict=True
    )
    return names[0], torch.stack(means).sum(0), [_sum(g) for g in zip(*gradients, strict=True)]


def _steps(batch: Batch) -> int:
    return max(x.shape[0] for x in batch.values())


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
