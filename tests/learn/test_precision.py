"""Gradient steps in eight bits follow those in full precision, and touch nothing else."""

import numpy as np
import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker

CASES = {
    "mlp": ("cartpole", {"type": "mlp", "hidden_sizes": [32]}, {"type": "ppo", "num_steps": 64}),
    "lstm": ({"type": "bandit"}, {"type": "lstm", "hidden_size": 16}, {"type": "rl2"}),
    "varibad": ("grid_nav", {"type": "belief", "latent": 4}, {"type": "varibad"}),
}


def updated(case, precision):
    """Metrics of the first minibatch of an update, weights before and after it, and a policy."""
    tasks, encoder, algorithm = CASES[case]
    settings = {"epochs": 1, "minibatches": 1, "lr": 1e-2}
    parts = (tasks, {"type": "actor_critic", "encoder": encoder}, algorithm | settings)
    parts = (Component.model_validate(part) for part in parts)
    rollout = RolloutSettings(shards=1, num_envs=128)
    spec = JobSpec("s", "s", 0, *parts, rollout, env_steps=10**6, precision=precision)
    learner = Learner(spec)
    with torch.no_grad():  # an almost uniform policy would hide what is lost
        learner.policy.policy_head.layer.weight *= 50
    before = learner.weights()
    _, trial, _ = RolloutWorker().collect(CollectCall(spec, 0, 0, 0), Weights(0, before), {})
    metrics = learner.update(0, 0, [trial])
    return metrics, before, learner.weights()


@pytest.mark.parametrize("case", CASES)
def test_eight_bits_take_almost_the_same_step(case):
    exact, start, end = updated(case, "float32")
    rough, _, rough_end = updated(case, "bfloat16")
    assert rough["value_loss"] != exact["value_loss"]  # it was another arithmetic
    assert rough["value_loss"] == pytest.approx(exact["value_loss"], rel=0.02)
    assert rough["entropy"] == pytest.approx(exact["entropy"], rel=0.02)
    assert rough["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    # Adam's first step is the sign of the gradient: most of them must agree.
    name = "policy_head.layer.weight"
    moves = [np.sign(e[name] - start[name]) for e in (end, rough_end)]
    assert (moves[0] == moves[1]).mean() > 0.9


@pytest.mark.parametrize("case", CASES)
def test_the_first_ratio_stays_near_one(case):
    metrics, _, _ = updated(case, "bfloat16")
    assert abs(metrics["approx_kl"]) < 2e-4
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize("case", CASES)
def test_weights_stay_in_full_precision(case):
    _, _, weights = updated(case, "bfloat16")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
