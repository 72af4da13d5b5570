"""The contract of an algorithm: an inner loop that collects, an outer loop that updates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.algorithms.parts import select
from dmrl_ray.config import Settings
from dmrl_ray.policy import ActorCritic
from dmrl_ray.rollout import Sampler
from dmrl_ray.tasks import TaskDistribution
from dmrl_ray.types import Arrays, Task, Trial


class Algorithm(ABC):
    """`collect` runs in rollout workers, `update` in learners; both own the same policy class.

    Networks that an algorithm needs beside the policy are put into ``policy.auxiliary`` when it is
    made. What a learner sets before `update`: `rng` (the random stream of this update), `precision`
    and, with several learners, `rank`, `world_size` and `average_gradients`. Learner and worker
    both set `progress`, the share of the budget spent.
    """

    class Config(Settings):
        """Settings of the optimiser, which every algorithm has."""

        optimizer: Literal["adam", "adamw", "sgd"] = "adam"
        """How gradients move the parameters."""

        lr: float = Field(default=1e-3, gt=0)
        """Step size."""

        anneal_lr: bool = False
        """Lower the step size linearly to zero over the budget."""

        weight_decay: float = Field(default=0.0, ge=0)
        """Decoupled with adamw, else an L2 penalty."""

        max_grad_norm: float = Field(default=0.5, gt=0)
        """Gradients longer than this are shortened to it."""

    sees_previous: bool = False
    """The policy is shown the previous action, reward and episode end."""

    memory_spans_trial: bool = False
    """The policy's memory, and so returns, survive the ends of episodes."""

    frozen_statistics: bool = False
    """Updates use batch normalisation and dropout as acting does; else as training does."""

    continues_episodes: bool = False
    """Episodes go on from one collection to the next; else every collection begins afresh."""

    corrects_for_lag: bool = False
    """Updates allow for actions of an older policy, so that `max_policy_lag` may be above 0."""

    recordable: bool = True
    """What `collect` returns was played, with the rewards that the environment gave."""

    on_device: bool = False
    """`collect` works with a sampler on a device, too, whose rollouts are of tensors."""

    learns_to_act: bool = True
    """False: returns say nothing of what is learned, and the last policy counts as the best."""

    run_folder: str = ""
    """Of the run, for what earlier stages of it recorded."""

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        self.config = config
        self.distribution = distribution
        self.policy = policy
        self.rng = np.random.default_rng(0)
        self.progress = 0.0
        self.precision = torch.float32
        self.rank, self.world_size = 0, 1
        self.average_gradients: Callable[[Tensor], Tensor] | None = None
        self.skipped_batches = 0

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        """How its policy is made: what `ActorCritic` takes by keyword."""
        return {"sees_previous": cls.sees_previous}

    @property
    def columns_per_task(self) -> int:
        """Environment columns that play one task side by side."""
        return 1

    @property
    def evaluation_episodes(self) -> int:
        """Episodes of a column that count in an evaluation, after each `begin_episodes`."""
        return self.distribution.episodes_per_trial

    @abstractmethod
    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """The inner loop: let the policy live through, and adapt to, these tasks."""

    @abstractmethod
    def update(self, trial: Trial) -> dict[str, float]:
        """The outer loop: improve the policy from what all shards collected, as tensors."""

    def evaluate(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Live through one trial on each task, as `collect` does but without learning from it."""
        sampler.begin_trial(tasks, self.policy)
        return self.play(sampler, self.distribution.trial_steps)

    def play(self, sampler: Sampler, num_steps: int) -> Trial:
        """Go on acting, adapting by what the policy remembers alone."""
        return [sampler.rollout(self.policy, num_steps, with_value=False)]

    def learning_rate(self, name: str) -> float:
        """Step size of the parameter of this name."""
        return self.config.lr

    def get_state(self) -> Arrays:
        """What the next update depends on beside weights and optimiser, such as replay."""
        return {}

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        assert not state

    def prepare_training(self, trainable: tuple[str, ...] = ("",)) -> None:
        """Freeze the parameters outside `trainable` and make the optimiser for the rest.

        Raises:
            ValueError: a part matches no parameter.
        """
        chosen = select("trainable", trainable, [n for n, _ in self.policy.named_parameters()])
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(name in chosen)
        moving = {n: p for n, p in self.policy.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(moving), list(moving.values())
        config = self.config
        decay = config.weight_decay
        # One group for each step size: a fused step is one call a group.
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, parameter in moving.items():
            by_rate.setdefault(self.learning_rate(name), []).append(parameter)
        groups = [{"params": p, "lr": lr, "base_lr": lr} for lr, p in by_rate.items()]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, config.lr, weight_decay=decay)
        else:
            kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
            self.optimizer = kind(groups, config.lr, eps=1e-5, weight_decay=decay, fused=True)

    def step_optimizer(self, loss: Tensor, parts: tuple[str, ...] = ("",)) -> Tensor:
        """One gradient step; returns the gradient's norm before clipping.

        A loss or gradient that is not finite leaves parameters and optimiser as they are and is
        counted in `skipped_batches`.

        Args:
            loss: scalar.
            parts: prefixes of the parameter names that it moves; others keep still, whatever the
                loss depends on.
        """
        moving = [
            p for n, p in zip(self.names, self.parameters, strict=True) if n.startswith(parts)
        ]
        if not moving:
            return torch.zeros(())
        slopes = torch.autograd.grad(loss, moving, allow_unused=True)
        reached = [(p, g) for p, g in zip(moving, slopes, strict=True) if g is not None]
        # In one piece, a gradient is averaged, measured and shortened by an operation each.
        gradient = torch.cat([g.flatten() for _, g in reached])
        if self.average_gradients is not None:
            gradient = self.average_gradients(gradient)
        norm = gradient.norm()
        if not math.isfinite(norm):
            self.skipped_batches += 1
            return norm
        gradient *= (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.config.anneal_lr:
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * max(0.0, 1.0 - self.progress)
        pieces = torch.split(gradient, [g.numel() for _, g in reached])
        for (parameter, g), piece in zip(reached, pieces, strict=True):
            parameter.grad = piece.view_as(g)
        self.optimizer.step()
        for parameter in moving:  # The next step may be of other ones.
            parameter.grad = None
        self.policy.project()
        return norm
