"""Gradient steps on minibatches of columns, and what a policy is shown in them.

A batch is tensors (T, B, ...) by name, or numbers () that are the same for all columns. Minibatches
are whole columns; for a policy without memory every step is a column of its own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dmrl_ray.backend import permutation
from dmrl_ray.learn.descent import Descent
from dmrl_ray.learn.gradients import Batch, Loss, Report
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, previous_inputs
from dmrl_ray.types import Rollout

PREVIOUS = ("previous_action", "previous_reward", "previous_done")


def step_through(
    algorithm: Descent, batch: Batch, loss: Loss, *, epochs: int, minibatches: int
) -> dict[str, float]:
    """Pass over a batch in random minibatches, a gradient step on each.

    Of several learners each takes its share of every minibatch.

    Returns:
        Means over all steps of what `loss` reports, and of ``grad_norm``.
    """
    first = next(iter(batch.values()))
    columns, rank, world_size = first.shape[1], algorithm.rank, algorithm.world_size
    count = min(minibatches, columns)
    bounds = [columns * i // count for i in range(count + 1)]
    exact = algorithm.precision == torch.float32

    def in_precision(minibatch: Batch) -> tuple[Tensor, Report]:
        if exact:
            return loss(minibatch)
        with torch.autocast(first.device.type, algorithm.precision):
            return loss(minibatch)

    steps = []
    for _ in range(epochs):
        order = permutation(algorithm.rng, columns, first.device)
        for start, stop in pairwise(bounds):
            mine = order[start + rank : stop : world_size]
            minibatch = {k: x.index_select(1, mine) if x.dim() else x for k, x in batch.items()}
            share = len(mine) / (stop - start)
            if "mask" in batch and world_size > 1:
                whole = batch["mask"].index_select(1, order[start:stop]).sum()
                share = float(minibatch["mask"].sum() / whole.clamp_min(1))
            report = algorithm.descend(in_precision, minibatch, share * world_size)
            steps.append(torch.stack(list(report.values())))
    return dict(zip(report, torch.stack(steps).mean(0).tolist(), strict=True))


def shown(policy: ActorCritic, rollout: Rollout) -> Batch:
    """What the policy was shown at each step, where its memory was reset, and what counts.

    Without a ``mask`` all steps count.
    """
    batch: Batch = {"obs": rollout.obs[:-1]}
    if not rollout.all_count:
        batch["mask"] = rollout.mask
    if policy.sees_previous:
        batch |= dict(zip(PREVIOUS, previous_inputs(rollout), strict=True))
    if policy.recurrent and rollout.reset[1:].any():
        batch["reset"] = rollout.reset
    return batch


def in_columns(policy: ActorCritic, batch: Batch) -> Batch:
    """The batch, with every step a column of its own if the policy has no memory."""
    return batch if policy.recurrent else single_steps(batch)


def single_steps(batch: Batch) -> Batch:
    """(1, N, ...) of the N steps that count; numbers () stay as they are."""
    rows = {name: x.flatten(0, 1) for name, x in batch.items() if x.dim()}
    mask = rows.pop("mask", None)
    if mask is not None:
        rows = {name: x[mask] for name, x in rows.items()}
    return {k: rows[k].unsqueeze(0) if k in rows else x for k, x in batch.items() if k != "mask"}


def previous_in(batch: Batch) -> Previous | None:
    """The previous steps in a batch, if the policy is shown them."""
    if PREVIOUS[0] not in batch:
        return None
    action, reward, done = (batch[name] for name in PREVIOUS)
    return action, reward, done
