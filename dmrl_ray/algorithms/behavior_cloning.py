"""Behaviour cloning: the recorded actions are made likely.

Source: Pomerleau, "ALVINN: An Autonomous Land Vehicle in a Neural Network", 1988, as maximum
likelihood. A policy with memory reads whole episodes; `TrialCloning` whole trials, with previous
actions and rewards, so that a policy comes to adapt as the one did that was recorded.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dmrl_ray.algorithms.offline import Offline
from dmrl_ray.learn.minibatches import previous_in
from dmrl_ray.types import Trial


class BehaviorCloning(Offline):
    """Maximum likelihood of actions, given the observation or the episode so far."""

    def batch(self, trial: Trial) -> dict[str, Tensor]:
        (rollout,) = trial
        return self.inputs(rollout)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        memory, previous = self.empty_memory(batch), previous_in(batch)
        pi, _, _ = self.policy(batch["obs"], previous, memory, batch.get("reset"))
        head = self.policy.policy_head
        loss = -head.log_prob(pi, batch["action"]).mean()
        return loss, {"entropy": head.entropy(pi).mean()}


class TrialCloning(BehaviorCloning):
    """Maximum likelihood of actions, given the trial so far."""

    memory_spans_trial = True

    def read(self, rng: np.random.Generator, columns: int) -> Trial:
        return [self.dataset.units(rng, "trial", columns, self.num_steps)]
