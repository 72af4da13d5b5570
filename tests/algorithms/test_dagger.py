"""Imitation of an oracle: who acts, what is learned, and that it is enough."""

import numpy as np
import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.spec import JobSpec, build
from dmrl_ray.types import Rollout, random_stream
from tests.learn.first_gradient import first_loss

COLUMNS = 64


def program(encoder="gru", **settings):
    spec = JobSpec(
        "s",
        "s",
        0,
        Component(type="bandit", arms=2, pulls=10),
        Component(type="actor_critic", encoder={"type": encoder}),
        Component(type="dagger", **settings),
        RolloutSettings(num_envs=COLUMNS),
    )
    return build(spec)


def collect(program, iteration=0):
    sampler = program.sampler(COLUMNS)
    sampler.start(random_stream(0, "collect", iteration), 0)
    tasks = program.distribution.sample(random_stream(0, "tasks", iteration), COLUMNS, "train")
    return program.algorithm.collect(sampler, tasks)


def agreement(rollout):
    """(B,) share of the steps at which the oracle's action was taken."""
    return (rollout.action == rollout.expert_action).mean(0)


def test_the_oracle_acts_in_its_share_of_the_columns_alone():
    (rollout,) = collect(program(beta=0.25))
    same = agreement(rollout)
    assert (same[:16] == 1).all()
    assert same[16:].mean() < 0.9


def test_the_oracle_hands_over_as_training_goes_on():
    half = program(beta=1.0, beta_until=0.5)
    half.algorithm.progress = 0.25
    (rollout,) = collect(half)
    assert (agreement(rollout)[:32] == 1).all()
    assert agreement(rollout)[32:].mean() < 0.9
    half.algorithm.progress = 0.5
    (rollout,) = collect(half)
    assert (agreement(rollout) == 1).mean() < 0.5


@pytest.mark.parametrize("encoder", ["gru", "mlp"])
def test_the_loss_is_the_likelihood_of_what_the_oracle_would_do(encoder):
    ours = program(encoder)
    ours.algorithm.prepare_training()
    (rollout,) = collect(ours)
    loss, report = first_loss(ours.algorithm, [rollout.map(torch.from_numpy)])
    # The head begins close to uniform over the two arms.
    assert report["imitation_loss"].item() == pytest.approx(np.log(2), abs=0.02)
    value_part = ours.algorithm.config.value_coef * report["value_loss"]
    assert loss.item() == pytest.approx((report["imitation_loss"] + value_part).item())


@pytest.mark.slow
def test_imitation_alone_reaches_the_oracle():
    ours = program(beta=0.0)
    ours.algorithm.prepare_training()
    for iteration in range(150):
        trial = [Rollout.concatenate([r]).map(torch.from_numpy) for r in collect(ours, iteration)]
        ours.algorithm.rng = random_stream(0, "update", iteration)
        ours.algorithm.update(trial)
    (rollout,) = collect(ours, 1000)
    assert agreement(rollout).mean() > 0.85
