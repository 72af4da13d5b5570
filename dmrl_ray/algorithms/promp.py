"""Proximal meta-policy search: MAML whose outer loop also minds how far the start has moved.

Source: Rothfuss et al., "ProMP: Proximal Meta-Policy Search", 2019 (arXiv:1810.06784),
algorithm 1 and eq. 10. The inner steps' likelihood ratios (eq. 9) are those of every
gradient-based method here; what remains is more steps on each batch, held back by a clip after
adaptation and by a KL penalty before it.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.maml import MAML
from dmrl_ray.config.components import Number
from dmrl_ray.learn.per_task import Parameters, task_mask
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.types import Trial


class ProMP(MAML):
    """MAML with proximal outer steps."""

    class Config(MAML.Config):
        epochs: Number = 5  # Rothfuss et al. 2019, appendix D
        """Outer gradient steps on each batch; each adapts anew from the moved parameters."""

        kl_penalty: float = Field(default=5e-4, ge=0)  # the same
        """Weight of the KL divergence between the policies that acted before and between the
        inner steps and what the outer steps made of them (eta in the paper)."""

    config: Config
    compiles = False

    def update(self, trial: Trial) -> dict[str, float]:
        self._acted: list[Tensor] = []
        return super().update(trial)

    def outer_loss(
        self, path: list[Parameters], trial: Trial, advantages: list[Tensor] | None = None
    ) -> Tensor:
        loss = super().outer_loss(path, trial, advantages)
        return loss + self.config.kl_penalty * self._kl(path, trial)

    def _kl(self, path: list[Parameters], trial: Trial) -> Tensor:
        head = self.policy.policy_head
        pis = self.pis(path[:-1], trial[:-1])
        if not self._acted:  # The first outer step starts from the parameters that acted.
            self._acted = [pi.detach() for pi in pis]
        before = trial[:-1]
        kls = [head.kl(old, pi) for old, pi in zip(self._acted, pis, strict=True)]
        if self.config.steps_per_adaptation is not None:  # A step weighs the same wherever it is.
            return counted_mean(torch.cat(kls), task_mask(before, path[0]))
        means = [
            counted_mean(kl, task_mask([rollout], path[0]))
            for kl, rollout in zip(kls, before, strict=True)
        ]
        return torch.stack(means).mean()
