"""Imitation of a family's oracle while the policy itself acts.

Source: Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret
Online Learning", 2011 (DAgger, arXiv:1011.0686), algorithm 3.1, with the newest iteration's data
alone in place of all data so far: simulated oracles answer for free. The oracle is fair
(`TaskVectorEnv.expert_action`): it knows what it was shown, so that a policy with memory can come
to do the same. Duan et al. 2016 (arXiv:1611.02779, section 3.1) found that what keeps RL^2 from
the Gittins index is its optimisation and not its network; this is the way around that.

The value function learns the returns of the policy that acts, so that reinforcement learning can
take over without a jump.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.ppo import BatchConfig
from dmrl_ray.algorithms.rl2 import RL2
from dmrl_ray.config.components import Number
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Task, Trial


class DAgger(RL2):
    """Whole trials, in which every step is labelled with what the oracle would have done."""

    class Config(BatchConfig):
        read_with: ClassVar = {"beta_until": ("beta", ())}

        lr: float = Field(default=2e-3, gt=0)
        """Step size."""

        epochs: Number = 1
        """Passes over each batch."""

        beta: float = Field(default=0.5, ge=0, le=1)
        """Share of the columns in which the oracle acts at first (beta in the paper)."""

        beta_until: float = Field(default=0.5, gt=0, le=1)
        """Share of the budget after which it acts in none; the decline is linear."""

    config: Config
    labels = ("expert_action",)
    on_device = False

    @classmethod
    def schedules(cls, config: Any) -> list[str]:
        return super().schedules(config) + (["beta"] if config.beta else [])

    @property
    def asked(self) -> str:
        return "expert_action"

    @property
    def epochs(self) -> int:
        """Passes over each batch."""
        return self.config.epochs

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        sampler.env.tracks_belief = True
        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        share = self.config.beta * max(0.0, 1 - self.progress / self.config.beta_until)
        return [self.with_advantage(sampler.rollout(self.policy, beta=share))]

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The negative log-likelihood of what the oracle would do."""
        pi, value_loss = self._forward(batch)
        head, action = self.policy.policy_head, batch["expert_action"]
        log_prob, entropies = head.log_prob_and_entropy(pi, action)
        mask = batch.get("mask")
        imitation_loss = -counted_mean(log_prob, mask)
        report = {
            "imitation_loss": imitation_loss,
            "value_loss": value_loss,
            "entropy": counted_mean(entropies, mask),
        }
        loss = imitation_loss + self.config.value_coef * value_loss
        return loss, report
