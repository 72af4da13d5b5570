"""Gradient steps on a policy: optimiser, clipping, schedules and averages over learners."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from dmrl_ray.config.schema import Settings
from dmrl_ray.learn.gradients import (
    Batch,
    Gradients,
    Grads,
    Loss,
    Report,
    by_autograd,
)
from dmrl_ray.learn.minibatches import shuffled
from dmrl_ray.learn.optimizers import SGD, Adam, AdamW
from dmrl_ray.learn.trainable import select
from dmrl_ray.networks.actor_critic import ActorCritic

EPS = 1e-5  # as in OpenAI Baselines; PyTorch has 1e-8
"""Added to the root of Adam's second moment."""


class Descent:
    """The gradient steps of an optimiser, shared by all algorithms.

    Attributes:
        progress: share of the job's budget that was spent before this iteration, in a collection
            and in the update that learns from it: 0 in the first, below 1 in the last, so that
            a schedule that ends at zero is above zero in every update.
        precision: of the layers below the heads, in steps on minibatches.
        gradients: how `descend` differentiates.
        rank, world_size: of this learner, among how many.
        rng: the random stream of this update.
        average_gradients: of several learners.
        skipped_batches: steps that were not taken, as their gradient was not finite.
    """

    class Config(Settings):
        """Settings of the optimiser, which every algorithm has."""

        scheduled: ClassVar[tuple[str, ...]] = ("anneal_lr",)
        """Settings that, where they are on, change training over the budget."""

        optimizer: Literal["adam", "adamw", "sgd"] = "adam"
        """Optimiser of the gradient steps."""

        lr: float = Field(default=1e-3, gt=0)
        """Step size."""

        anneal_lr: bool = False
        """Lower the step size linearly over the budget: of n updates the first has all of it, the
        last 1/n."""

        weight_decay: float = Field(default=0.0, ge=0)
        """Decoupled with adamw, else an L2 penalty."""

        max_grad_norm: float = Field(default=0.5, gt=0)
        """Norm that longer gradients are clipped to."""

    def __init__(self, config: Config, policy: ActorCritic) -> None:
        self.config = config
        self.policy = policy
        self.progress = 0.0
        self.precision = torch.float32
        self.gradients: Gradients = by_autograd
        self.rank, self.world_size = 0, 1
        self.rng = np.random.default_rng(0)
        self.average_gradients: Callable[[Tensor], Tensor] | None = None
        self.skipped_batches = 0

    @classmethod
    def schedules(cls, config: Any) -> list[str]:
        """Settings by which training changes over the budget, as `progress` counts it."""
        return [name for name in config.scheduled if getattr(config, name)]

    def learning_rate(self, name: str) -> float:
        """Step size of the parameter of this name."""
        return self.config.lr

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
            self.optimizer = SGD(groups, config.lr, weight_decay=decay)
        else:
            kind = Adam if config.optimizer == "adam" else AdamW
            self.optimizer = kind(groups, config.lr, eps=EPS, weight_decay=decay, fused=True)

    def optimize(
        self, loss: Loss, batch: Batch, *, epochs: int, minibatches: int
    ) -> dict[str, float]:
        """Pass over a batch in random minibatches of environments, a gradient step on each.

        Handles mixed precision, compiled code and data parallelism: each learner has its share of
        every minibatch.

        Returns:
            Means over all steps of the loss's metrics, and of ``grad_norm``.
        """

        def in_precision(minibatch: Batch) -> tuple[Tensor, Report]:
            if self.precision == torch.float32:
                return loss(minibatch)
            with torch.autocast(next(iter(minibatch.values())).device.type, self.precision):
                return loss(minibatch)

        ranks = {"rank": self.rank, "world_size": self.world_size}
        steps = []
        for _ in range(epochs):
            for minibatch, weight in shuffled(batch, minibatches, self.rng, **ranks):
                report = self.descend(in_precision, minibatch, weight)
                steps.append(torch.stack(list(report.values())))
        return dict(zip(report, torch.stack(steps).mean(0).tolist(), strict=True))

    def descend(
        self, loss: Loss, batch: Batch, weight: float = 1.0, parts: tuple[str, ...] = ("",)
    ) -> Report:
        """One gradient step on the loss of a batch; returns its metrics, and ``grad_norm``.

        Args:
            loss: reads the policy, the batch and, if it is compiled, nothing else that changes.
            batch: tensors by name.
            weight: of the gradient, among those of other learners.
            parts: as in `step_optimizer`.
        """
        moving = self._moving(parts)
        grads, report = self.gradients(moving, loss, batch)
        return report | {"grad_norm": self._step(list(moving.values()), grads, weight)}

    def step_optimizer(self, loss: Tensor, parts: tuple[str, ...] = ("",)) -> Tensor:
        """One gradient step on a loss; returns the gradient's norm before clipping.

        A gradient that is not finite leaves parameters and optimiser as they are and is counted in
        `skipped_batches`.

        Args:
            loss: scalar.
            parts: prefixes of the parameter names that it moves; others stay as they are,
                whatever the loss depends on.
        """
        moving = self._moving(parts)
        grads, _ = by_autograd(moving, lambda _: (loss, {}), {})
        return self._step(list(moving.values()), grads)

    def _moving(self, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
        named = zip(self.names, self.parameters, strict=True)
        return {name: parameter for name, parameter in named if name.startswith(parts)}

    def _step(self, moving: list[nn.Parameter], grads: Grads, weight: float = 1.0) -> Tensor:
        reached = [(p, g) for p, g in zip(moving, grads, strict=True) if g is not None]
        if not reached:
            return torch.zeros(())
        # In one piece, a gradient is averaged, measured and clipped by an operation each.
        gradient = torch.cat([g.flatten() for _, g in reached])
        if weight != 1.0:
            gradient *= weight
        if self.average_gradients is not None:
            gradient = self.average_gradients(gradient)
        norm = gradient.norm()
        if not math.isfinite(norm):
            self.skipped_batches += 1
            return norm
        gradient *= (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if self.config.anneal_lr:
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * (1.0 - self.progress)
        pieces = torch.split(gradient, [g.numel() for _, g in reached])
        for (parameter, g), piece in zip(reached, pieces, strict=True):
            parameter.grad = piece.view_as(g)
        self.optimizer.step()
        for parameter in moving:  # The next step may be of other ones.
            parameter.grad = None
        self.policy.project()
        return norm
