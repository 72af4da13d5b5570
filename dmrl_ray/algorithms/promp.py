"""Proximal meta-policy search: MAML whose outer steps are also held back before adaptation.

Source: Rothfuss et al., "ProMP: Proximal Meta-Policy Search", 2019 (arXiv:1810.06784),
algorithm 1. The inner steps' likelihood ratios (eq. 9) and the clipped objective (eq. 10) are those
of every gradient-based method here; what remains is more steps on each batch, and a KL penalty on
the policies before adaptation (eq. 12).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.maml import MAML
from dmrl_ray.config.components import Number
from dmrl_ray.learn.per_task import Parameters, by_task, task_mask, trial_pi
from dmrl_ray.losses.policy_gradient import kl_penalty
from dmrl_ray.types import Trial


class ProMP(MAML):
    """MAML with proximal outer steps."""

    class Config(MAML.Config):
        epochs: Number = 5  # Rothfuss et al. 2019, appendix D
        """Outer gradient steps on each batch; each adapts again from the parameters that the last
        one led to."""

        kl_penalty: float = Field(default=5e-4, ge=0)  # the same
        """Weight of the KL divergence from the policies before and between the inner steps to
        those that the outer steps made of them (eta in the paper)."""

    config: Config
    compiles = False

    def update(self, trial: Trial) -> dict[str, float]:
        """Steps along the gradient of J^ProMP from theta_old, with which the update begins."""
        advantage, old_pi = self.outer_advantage(trial), self.support_pi(trial)
        return self.outer_step(self.proximal_loss, trial, advantage, old_pi)

    def support_pi(self, trial: Trial) -> Tensor:
        """(T, B, P) distributions of the supports' actions under the parameters as they are."""
        support = trial[:-1]
        pi = trial_pi(self.policy, self.adapted_params(support), support)
        return pi.detach().flatten(1, 2)

    def proximal_loss(
        self, trial: Trial, advantage: Tensor, old_pi: Tensor
    ) -> tuple[Tensor, list[Parameters]]:
        """J^ProMP = J^CLIP - eta * KL(pi_theta_old, pi_theta), negated (eq. 12).

        Args:
            trial: of some tasks.
            advantage: (T, B) of the query.
            old_pi: (T, B, P) of the supports, as `support_pi` under theta_old.
        """
        loss, adapted_params = self.meta_loss(trial, advantage)  # eq. 10
        penalty = self.penalty(adapted_params, trial, old_pi)
        return loss + self.config.kl_penalty * penalty, adapted_params

    def penalty(self, adapted_params: list[Parameters], trial: Trial, old_pi: Tensor) -> Tensor:
        """The KL divergence of `proximal_loss`."""
        support, params = trial[:-1], adapted_params[:-1]
        old_pi, pi = by_task(old_pi, params[0]), trial_pi(self.policy, params, support)
        kl = self.policy.policy_head.kl(old_pi, pi)  # (T, N, E)
        if self.inner_loop.within_trial:  # A step weighs the same, whichever rollout it is in.
            return kl_penalty([kl], [task_mask(support, params[0])])
        by_rollout = torch.split(kl, [rollout.num_steps for rollout in support])
        return kl_penalty(by_rollout, [task_mask([rollout], params[0]) for rollout in support])
