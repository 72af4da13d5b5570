"""Algorithm distillation: a sequence model that imitates not a policy, but its learning.

Source: Laskin et al., "In-context Reinforcement Learning with Algorithm DAgger", 2022
(arXiv:2210.14215), algorithm 1 and section 4. A learner's histories, each of one task from its
first episode to its last, are recorded (a finetune stage with ``record: true``); a causal model
foretells each action from what came before it in the history, across episodes, and so has to
improve on itself as the learner did. It then improves on new tasks without any gradient step. The
context must span several episodes; where learning was slow, `every` takes fewer episodes of each
history, so that improvement shows within a context.
"""

from __future__ import annotations

import numpy as np

from dmrl_ray.algorithms.behavior_cloning import BehaviorCloning
from dmrl_ray.config.components import Number
from dmrl_ray.types import Trial


class AlgorithmDistillation(BehaviorCloning):
    """Cloning of learning histories, whole episodes in the order in which they were collected."""

    class Config(BehaviorCloning.Config):
        every: Number = 1
        """Of each history every n-th episode is read, beginning with one of the first n."""

    config: Config
    memory_spans_trial = True

    def read(self, rng: np.random.Generator, columns: int) -> Trial:
        every = self.config.every
        return [self.dataset.histories(rng, columns, self.num_steps, every=every)]
