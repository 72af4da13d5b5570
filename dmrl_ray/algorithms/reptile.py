"""Reptile: move towards where a few gradient steps lead, task by task.

Source: Nichol et al., "On First-Order Meta-Learning Algorithms", 2018 (arXiv:1803.02999),
algorithm 2, with the mean over tasks of (theta - phi) / inner_lr as a gradient for the outer
optimiser (section 2 there). With one inner step this is joint training on all tasks; with more,
tasks whose gradients agree from step to step count more. There is no rollout after the last
inner step: the step itself is what is learned from.
"""

from __future__ import annotations

import torch

from dmrl_ray.algorithms.inner_loop import GradientAdaptation
from dmrl_ray.config.components import Number
from dmrl_ray.types import Trial


class Reptile(GradientAdaptation):
    """Adapt by gradient steps; follow them."""

    class Config(GradientAdaptation.Config):
        inner_steps: Number = 3
        """Gradient steps taken on each task; with one, nothing is learned about adaptation."""

    config: Config

    @property
    def rollouts_per_trial(self) -> int:
        """One for each inner step: what comes after the last is not acted on."""
        return self.config.inner_steps

    def update(self, trial: Trial) -> dict[str, float]:
        skipped = self.skipped_batches
        own = self.own_tasks(trial)
        start, *_, end = self.adaptation(own.trial, create_graph=False)
        with torch.no_grad():
            scale = own.weight / self.config.inner_lr
            gradient = {n: (start[n] - end[n]).mean(0) * scale for n in start}
        now = dict(self.policy.named_parameters())
        loss = torch.stack([(now[n] * g).sum() for n, g in gradient.items()]).sum()
        norm = self.step_optimizer(loss)
        if self.skipped_batches == skipped:
            self.policy.update_obs_norm(torch.cat([r.counted(r.obs[:-1]) for r in trial]))
        first, last = (r.mean_return() for r in (trial[0], trial[-1]))
        return {"grad_norm": float(norm), "return/before": first, "return/last": last}
