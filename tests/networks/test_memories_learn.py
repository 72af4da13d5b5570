"""What a memory is for: bandits whose arms are told by previous actions and rewards alone."""

import numpy as np
import pytest

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, EvaluateCall, RolloutWorker


def train_on_bandits(encoder, updates):
    """Mean return of 5-armed bandits of 10 pulls, held out and greedy."""
    network, algorithm = {"encoder": encoder}, {"type": "rl2", "minibatches": 8}
    parts = ({"type": "bandit"}, {"type": "actor_critic"} | network, algorithm)
    parts = (Component.model_validate(part) for part in parts)
    spec = JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=512))
    learner, worker = Learner(spec), RolloutWorker()
    for i in range(updates):
        weights = Weights(i, learner.weights())
        _, trial, _ = worker.collect(CollectCall(spec, 0, i, 0), weights, {})
        learner.update(i, 0, [trial])
    tasks = tuple(learner.algorithm.distribution.sample(np.random.default_rng(1), 2000, "test"))
    call = EvaluateCall(spec, tasks, 0, 0, True, 0)
    return worker.evaluate(call, Weights(0, learner.weights()))["return"].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "enough"),
    [
        ({"type": "symmetric"}, 6.3),
        ({"type": "symmetric", "updates": "taken"}, 6.3),
        ({"type": "transformer", "context": 10, "hidden_size": 32, "heads": 2}, 5.8),
    ],
    ids=lambda value: None if isinstance(value, float) else "-".join(map(str, value.values())),
)
def test_a_memory_finds_good_arms_of_held_out_bandits(encoder, enough):
    # Random arms give 5.0; the Bayes-optimal policy about 6.7.
    assert train_on_bandits(encoder, 25) > enough
