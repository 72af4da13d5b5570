"""Algorithm distillation: a sequence model that imitates how a policy learned.

Source: Laskin et al., "In-context Reinforcement Learning with Algorithm Distillation", 2022
(arXiv:2210.14215), algorithm 1 and section 4. Learning histories, each of one task from its first
episode to its last, are recorded (a finetune stage with ``record: true``); a causal model predicts
each action from what came before it in the history, across episodes, and so has to improve on
itself as the learner did. It then improves on new tasks without any gradient step. The context
must span several episodes; where learning was slow, `every` takes fewer episodes of each history,
so that a context has improvement in it.
"""

from __future__ import annotations

from functools import partial

from dmrl_ray.algorithms.behavior_cloning import cloning_batch, cloning_loss
from dmrl_ray.algorithms.offline import Offline
from dmrl_ray.config.components import Number
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Task, Trial


class AlgorithmDistillation(Offline):
    """Cloning of learning histories, whole episodes in the order in which they were collected."""

    class Config(Offline.Config):
        every: Number = 1
        """Every n-th episode of each history is read, beginning with one of the first n."""

    config: Config
    memory_spans_trial = True

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Subsequences of learning histories, each across episodes (algorithm 1)."""
        rng, envs, every = sampler.rng, sampler.num_envs, self.config.every
        return [self.dataset.histories(rng, envs, self.num_steps, every=every)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Maximise the likelihood of each action, given the history before it (algorithm 1)."""
        (rollout,), policy = trial, self.policy
        return self.fit(partial(cloning_loss, policy), cloning_batch(policy, rollout), rollout)
