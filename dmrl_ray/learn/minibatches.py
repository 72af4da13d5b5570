"""A rollout as the batch that a loss reads, and its random minibatches.

A batch is tensors (T, B, ...) by name, or numbers () that are the same for all environments.
Minibatches are whole environments; for a policy without memory every step is an environment of its
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from torch import Tensor

from dmrl_ray.backend import permutation
from dmrl_ray.learn.gradients import Batch
from dmrl_ray.networks.actor_critic import ActorCritic, Previous, previous_inputs
from dmrl_ray.networks.base import Memory
from dmrl_ray.types import Rollout

PREVIOUS = ("previous_action", "previous_reward", "previous_done")


def shuffled(
    batch: Batch, minibatches: int, rng: np.random.Generator, *, rank: int, world_size: int
) -> Iterator[tuple[Batch, float]]:
    """One pass over a batch in random minibatches: a learner's part of each, and its weight.

    With the weights, the average of the learners' gradients is that of the whole minibatch.
    """
    first = next(iter(batch.values()))
    envs = first.shape[1]
    count = min(minibatches, envs)
    order = permutation(rng, envs, first.device)
    for start, stop in pairwise(envs * i // count for i in range(count + 1)):
        mine = order[start + rank : stop : world_size]
        minibatch = {k: x.index_select(1, mine) if x.dim() else x for k, x in batch.items()}
        share = len(mine) / (stop - start)
        if "mask" in batch and world_size > 1:
            whole = batch["mask"].index_select(1, order[start:stop]).sum()
            share = float(minibatch["mask"].sum() / whole.clamp_min(1))
        yield minibatch, share * world_size


def observed(policy: ActorCritic, rollout: Rollout) -> Batch:
    """The inputs of the policy at each step, where its memory was reset, and what counts.

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


def as_sequences(policy: ActorCritic, batch: Batch) -> Batch:
    """The batch, with every step a sequence of its own if the policy has no memory."""
    return batch if policy.recurrent else single_steps(batch)


def single_steps(batch: Batch) -> Batch:
    """(1, N, ...) of the N steps that count; numbers () stay as they are."""
    rows = {name: x.flatten(0, 1) for name, x in batch.items() if x.dim()}
    mask = rows.pop("mask", None)
    if mask is not None:
        rows = {name: x[mask] for name, x in rows.items()}
    return {k: rows[k].unsqueeze(0) if k in rows else x for k, x in batch.items() if k != "mask"}


def previous_in(batch: Batch) -> Previous | None:
    """The previous steps in a batch, if the policy observes them."""
    if PREVIOUS[0] not in batch:
        return None
    action, reward, done = (batch[name] for name in PREVIOUS)
    return action, reward, done


def memory_in(batch: Batch) -> Memory:
    """The memory before the first step of a batch; empty where the policy has none."""
    return tuple(x[0] for name, x in batch.items() if name.startswith("memory."))


def pi_and_value(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Tensor]:
    """Distribution parameters (T, B, P) and normalised values (T, B) of a batch."""
    obs, previous, reset = batch["obs"], previous_in(batch), batch.get("reset")
    pi, features, _ = policy(obs, previous, memory_in(batch), reset)
    shared = policy.value_encoder is None
    return pi, policy.value(features if shared else None, obs, previous, reset)
