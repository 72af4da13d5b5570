"""Model-agnostic meta-learning: parameters from which a few gradient steps suffice.

Source: Finn et al., "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", 2017
(arXiv:1703.03400), algorithm 3; its inner loop is `GradientAdaptation`. ``first_order``
gives FOMAML (section 5.2 there); ``trainable: [policy_head]`` gives ANIL (Raghu et al., 2020,
arXiv:1909.09157); ``outer: trpo`` is the paper's outer step, for which a clipped policy gradient
stands in by default.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.inner_loop import GradientAdaptation
from dmrl_ray.config.components import Number
from dmrl_ray.learn.descent import Descent
from dmrl_ray.learn.gradients import Batch, Loss, Report
from dmrl_ray.learn.per_task import (
    Parameters,
    by_task,
    task_log_prob,
    task_mask,
    task_pi,
    trial_advantages,
)
from dmrl_ray.learn.trust_region import trust_region_step
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.policy_gradient import likelihood_ratio_loss, ppo_clip_loss
from dmrl_ray.types import Trial

READ = ("obs", "action", "log_prob", "advantage")
"""What the losses of policies without memory read of a rollout, beside what counts of it."""


class MAML(GradientAdaptation):
    """Adapt by gradient steps within a trial; improve where those steps start from."""

    class Config(GradientAdaptation.Config):
        read_with: ClassVar = {
            "epochs": ("outer", ("clip",)),
            "clip": ("outer", ("clip",)),
            "max_kl": ("outer", ("trpo",)),
            "outer_gamma": ("steps_per_adaptation", ()),
            **dict.fromkeys(Descent.Config.model_fields, ("outer", ("clip", "vpg"))),
        }

        first_order: bool = False
        """True drops the second derivative (FOMAML): about half the memory, some bias."""

        outer: Literal["clip", "trpo", "vpg"] = "clip"
        """The outer step: clipped policy gradient, trust region, or plain policy gradient."""

        epochs: Number = 4
        """Outer gradient steps on each batch where they are clipped, else one; each adapts anew
        from the moved parameters."""

        clip: float = Field(default=0.3, gt=0)  # Rothfuss et al. 2019, table of hyper-parameters
        """Half-width of the outer trust interval around ratio 1."""

        max_kl: float = Field(default=0.01, gt=0)  # Finn et al. 2017, section 5.3
        """Nats by which a trust-region step may move the adapted policies; it knows no lr."""

        outer_gamma: float = Field(default=0.99, ge=0, le=1)
        """Discount of what a rollout earns in later ones of its trial, where it goes on
        (`steps_per_adaptation`): what is found out early pays late, and `gamma` is the inner
        loop's."""

    config: Config
    compiles = True
    outer_parts: tuple[str, ...] = ("",)
    """Prefixes of the parameters that the outer loop moves."""

    def update(self, trial: Trial) -> dict[str, float]:
        skipped = self.skipped_batches
        step = self._trust_region if self.config.outer == "trpo" else self._gradient_steps
        metrics = step(trial)
        if self.skipped_batches == skipped:
            seen = trial[-1:] if self.config.steps_per_adaptation is None else trial
            self.policy.update_obs_norm(torch.cat([r.counted(r.obs[:-1]) for r in seen]))
        before, after = (r.mean_return() for r in (trial[0], trial[-1]))
        return metrics | {"return/before": before, "return/after": after}

    def path(self, trial: Trial) -> list[Parameters]:
        """The parameters of each rollout, as functions of those that all tasks start from."""
        return self.adaptation(trial[:-1], create_graph=not self.config.first_order)

    def outer_loss(
        self, path: list[Parameters], trial: Trial, advantages: list[Tensor] | None = None
    ) -> Tensor:
        """Of the rollouts that count, with their advantages if they are not the trial's own.

        A step weighs the same wherever a trial was cut, and tasks count alike, also where their
        episodes have other lengths.
        """
        advantages = advantages or self.advantages(trial)
        counted, start = trial[-len(advantages) :], path[0]
        adapted = zip(path[-len(advantages) :], counted, strict=True)
        log_prob = torch.cat([task_log_prob(self.policy, *pair) for pair in adapted])
        acted = torch.cat([by_task(rollout.log_prob, start) for rollout in counted])
        advantage = torch.cat([by_task(x, start) for x in advantages])
        mask = task_mask(counted, start)
        dim = None if mask is None else (0, 2)
        if self.config.outer == "clip":
            clip = self.config.clip
            return ppo_clip_loss(log_prob, acted, advantage, clip=clip, mask=mask, dim=dim).mean()
        return likelihood_ratio_loss(log_prob, acted, advantage, mask=mask, dim=dim).mean()

    def advantages(self, trial: Trial) -> list[Tensor]:
        """(T, B) of the rollouts that count: the adapted ones, or all within one trial."""
        if self.config.steps_per_adaptation is None:
            return [trial[-1].advantage]
        gamma, gae_lambda = self.config.outer_gamma, self.config.gae_lambda
        return trial_advantages(trial, gamma=gamma, gae_lambda=gae_lambda)

    def pis(self, path: list[Parameters], trial: Trial) -> list[Tensor]:
        """(T, N, E, P) distributions of the actions of each rollout."""
        return [task_pi(self.policy, *pair) for pair in zip(path, trial, strict=True)]

    def own_loss(self, trial: Trial) -> tuple[Loss, Batch, float]:
        """The outer loss of this learner's tasks, what it reads, and what it weighs.

        Its average over learners is that of all tasks.
        """
        own = self.own_tasks(trial)
        mine = own.trial
        read = READ if all(rollout.all_count for rollout in mine) else (*READ, "mask")
        batch = {
            f"{i}.{name}": getattr(rollout, name) for i, rollout in enumerate(mine) for name in read
        }
        counted = [advantage[:, own.columns] for advantage in self.advantages(trial)]
        batch |= {f"counted.{i}": advantage for i, advantage in enumerate(counted)}
        # Numbers of tasks are looked up in it, which compilers want to know beforehand.
        task_index = mine[0].task_index.cpu().numpy()

        def loss(batch: Batch) -> tuple[Tensor, Report]:
            arrays: list[dict[str, Any]] = [
                {name: batch[f"{i}.{name}"] for name in read} for i in range(len(mine))
            ]
            parts = [
                replace(rollout, task_index=task_index, **given)
                for rollout, given in zip(mine, arrays, strict=True)
            ]
            advantages = [batch[f"counted.{i}"] for i in range(len(counted))]
            value = self.outer_loss(self.path(parts), parts, advantages)
            return value, {"outer_loss": value}

        return loss, batch, own.weight

    def _gradient_steps(self, trial: Trial) -> dict[str, float]:
        loss, batch, weight = self.own_loss(trial)
        reports = [
            self.descend(loss, batch, weight, self.outer_parts)
            for _ in range(self.config.epochs if self.config.outer == "clip" else 1)
        ]
        means = torch.stack([torch.stack(list(report.values())) for report in reports]).mean(0)
        return dict(zip(reports[0], means.tolist(), strict=True))

    def _trust_region(self, trial: Trial) -> dict[str, float]:
        head = self.policy.policy_head
        acted: list[Tensor] = []

        def objective() -> tuple[Tensor, Tensor]:
            path = self.path(trial)
            pis = self.pis(path, trial)
            if not acted:
                acted.extend(pi.detach() for pi in pis)
            counted = trial if self.config.steps_per_adaptation is not None else trial[-1:]
            pairs = list(zip(acted, pis, strict=True))[-len(counted) :]
            kls = torch.cat([head.kl(old, pi) for old, pi in pairs])
            return self.outer_loss(path, trial), counted_mean(kls, task_mask(counted, path[0]))

        moving = [
            parameter
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if name.startswith(self.outer_parts)
        ]
        metrics = trust_region_step(moving, objective, max_kl=self.config.max_kl)
        self.policy.project()
        if math.isnan(metrics["grad_norm"]):
            self.skipped_batches += 1
        return metrics
