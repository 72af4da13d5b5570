"""Online adaptation: a policy meets tasks that change without notice.

Memory-based policies just continue. Others take a gradient step after every round of episodes,
each stream on parameters of its own, by SGD or AdamW (Loshchilov and Hutter, 2019,
arXiv:1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.parts import check_prefixes
from dmrl_ray.algorithms.task_actor import Recordings, task_actor
from dmrl_ray.algorithms.task_params import (
    Parameters,
    fitted_advantage,
    number_of_tasks,
    per_task,
    task_gradients,
)
from dmrl_ray.config import Adapt
from dmrl_ray.rollout import Sampler
from dmrl_ray.types import Rollout, Task

Moments: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]


def check_steps(algorithm: Algorithm, settings: Adapt) -> None:
    """See that gradient steps can be taken on this policy, and prepare it.

    Raises:
        ValueError: it sees the previous step, or has a memory that gradient steps cannot adapt, or
            a part to move does not exist.
    """
    policy = algorithm.policy
    if settings.optimizer == "none":
        return
    if policy.sees_previous:
        raise ValueError(
            f"optimizer: {settings.optimizer!r} needs a policy that sees the observation alone; "
            "one that sees its previous step adapts by its memory, with optimizer none"
        )
    policy.encoder.use_plain_operations()
    check_prefixes("trainable", settings.trainable, per_task(policy, 1))


def live_through(
    algorithm: Algorithm, sampler: Sampler, streams: Sequence[Sequence[Task]], settings: Adapt
) -> np.ndarray:
    """Let a policy live through streams of tasks, adapting as it goes.

    Args:
        algorithm: whose policy it is.
        sampler: with ``len(streams) * settings.episodes_per_update`` columns.
        streams: the tasks of each stream, in order.
        settings: of the stage.

    Returns:
        (K, U, N) mean reward over a stream's parallel columns: at step u since change k, stream n.

    Raises:
        ValueError: as `check_steps`.
    """
    check_steps(algorithm, settings)
    policy = algorithm.policy
    horizon = algorithm.distribution.max_episode_steps
    params = per_task(policy, len(streams))
    moments: Moments = {}
    recordings: Recordings = {}
    step = 0
    rewards = []
    for change, tasks in enumerate(zip(*streams, strict=True)):
        if change == 0:
            sampler.begin_trial(tasks, policy)
        else:
            sampler.set_tasks(tasks)
            sampler.begin_episodes(forget=not algorithm.memory_spans_trial)
        for _ in range(settings.episodes_per_task):
            if settings.optimizer == "none":
                (rollout,) = algorithm.play(sampler, horizon)
            else:
                actor = task_actor(policy, params, recordings)
                rollout = sampler.rollout(policy, horizon, actor=actor, with_value=False)
                step += 1
                params = _step(algorithm, params, rollout, settings, moments, step)
            rewards.append(rollout.reward.reshape(horizon, len(streams), -1).mean(-1))
    per_change = settings.episodes_per_task * horizon
    return np.concatenate(rewards).reshape(-1, per_change, len(streams))


def _step(
    algorithm: Algorithm,
    params: Parameters,
    rollout: Rollout,
    settings: Adapt,
    moments: Moments,
    step: int,
) -> Parameters:
    """Every stream's parameters after one gradient step on its own rollout."""
    num_tasks = number_of_tasks(params)
    gamma = float(getattr(algorithm.config, "gamma", 0.99))
    rollout.advantage = fitted_advantage([rollout], num_tasks, gamma=gamma, gae_lambda=1.0)
    moving = [name for name in params if name.startswith(settings.trainable)]
    gradients = task_gradients(
        algorithm.policy, params, rollout.map(torch.from_numpy), moving, create_graph=False
    )
    with torch.no_grad():
        for name, gradient in gradients.items():
            if settings.optimizer == "adamw":
                direction = _adamw(moments, name, gradient, step) + 0.01 * params[name]
            else:
                direction = gradient
            params[name] = params[name] - settings.lr * direction
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _adamw(moments: Moments, name: str, gradient: torch.Tensor, step: int) -> torch.Tensor:
    """Adam's direction with betas (0.9, 0.999); decay is added outside, decoupled from it."""
    zero = torch.zeros_like(gradient)
    first, second = moments.get(name, (zero, zero))
    first = first.lerp(gradient, 0.1)
    second = second.lerp(gradient.square(), 0.001)
    moments[name] = (first, second)
    corrected = (second / (1 - 0.999**step)).sqrt() + 1e-8
    return first / (1 - 0.9**step) / corrected
