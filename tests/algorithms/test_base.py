"""What every algorithm inherits: optimiser steps on parts, step sizes by name, optional weights."""

import numpy as np
import pytest
import torch
from torch import nn

from dmrl_ray.algorithms.ppo import PPO
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights, build, get_weights, set_weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker


class TwoRates(PPO):
    """PPO with an auxiliary network that learns faster than the policy."""

    def __init__(self, config, distribution, policy):
        super().__init__(config, distribution, policy)
        policy.auxiliary["guess"] = nn.Linear(2, 1)

    def learning_rate(self, name):
        return 1.0 if name.startswith("auxiliary.") else 0.5


def program(kind="ppo", **settings):
    algorithm = Component(type=kind, optimizer="sgd", max_grad_norm=1e9, **settings)
    spec = JobSpec(
        "s",
        "s",
        0,
        Component(type="cartpole"),
        Component(type="actor_critic"),
        algorithm,
        RolloutSettings(num_envs=2),
    )
    return build(spec)


TWO_RATES = f"{__name__}:TwoRates"


def test_a_loss_moves_the_named_parts_alone():
    algorithm = program().algorithm
    algorithm.prepare_training()
    policy = algorithm.policy
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    loss = sum(p.sum() for p in policy.parameters())
    algorithm.step_optimizer(loss, ("value_head",))
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"value_head.weight", "value_head.bias"}


@pytest.mark.parametrize(
    ("name", "step"), [("auxiliary.guess.bias", 1.0), ("value_head.bias", 0.5)]
)
def test_a_parameter_moves_by_its_own_step_size(name, step):
    algorithm = program(TWO_RATES).algorithm
    algorithm.prepare_training()
    parameter = dict(algorithm.policy.named_parameters())[name]
    before = parameter.detach().clone()
    algorithm.step_optimizer(sum(p.sum() for p in algorithm.policy.parameters()))
    torch.testing.assert_close(before - parameter.detach(), torch.full_like(parameter, step))


def test_another_algorithm_starts_without_the_auxiliary_networks_of_the_first():
    first, second = program(TWO_RATES).policy, program().policy
    set_weights(second, get_weights(first))
    assert torch.equal(second.value_head.weight, first.value_head.weight)


def test_auxiliary_networks_that_the_first_algorithm_lacked_stay_as_they_began():
    first, second = program().policy, program(TWO_RATES).policy
    began = second.auxiliary["guess"].weight.detach().clone()
    set_weights(second, get_weights(first))
    assert torch.equal(second.auxiliary["guess"].weight, began)


def test_other_weights_that_are_missing_are_named():
    weights = get_weights(program().policy)
    del weights["value_head.bias"]
    with pytest.raises(ValueError, match=r"value_head\.bias is missing"):
        set_weights(program().policy, weights)


def test_auxiliary_networks_begin_the_same_for_the_same_seed():
    ours, theirs = (get_weights(program(TWO_RATES).policy) for _ in range(2))
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_a_loss_whose_parts_are_all_frozen_moves_nothing():
    algorithm = program().algorithm
    algorithm.prepare_training(("policy_head",))
    before = {n: p.detach().clone() for n, p in algorithm.policy.named_parameters()}
    loss = sum(p.sum() for p in algorithm.policy.parameters())
    assert algorithm.step_optimizer(loss, ("value_head",)) == 0
    assert all(torch.equal(p, before[n]) for n, p in algorithm.policy.named_parameters())


@pytest.mark.parametrize(
    ("algorithm", "encoder", "num_envs"),
    [
        ({"type": "maml", "episodes_per_task": 1}, "mlp", 4),
        ({"type": "maml", "episodes_per_task": 1, "steps_per_adaptation": 1}, "mlp", 1),
        ({"type": "ppo", "num_steps": 1}, "mlp", 1),
        ({"type": "rl2"}, "gru", 1),
    ],
    ids=["maml", "maml within a trial", "ppo", "rl2"],
)
def test_a_single_step_of_experience_can_be_learned_from(algorithm, encoder, num_envs):
    pulls = 2 if "steps_per_adaptation" in algorithm else 1
    parts = (
        {"type": "bandit", "arms": 2, "pulls": pulls},
        {"type": "actor_critic", "encoder": {"type": encoder}},
        algorithm,
    )
    parts = (Component.model_validate(part) for part in parts)
    learner = Learner(JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=num_envs)))
    weights = Weights(0, learner.weights())
    trial = RolloutWorker().collect(CollectCall(learner.spec, 0, 0, 0), weights, {})[1]
    metrics = learner.update(0, 0, [trial])
    assert not metrics.get("skipped_batches")
    assert all(np.isfinite(x).all() for x in learner.weights().values())


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("maml", True), ("pearl", True), ("rl2", False), ("ppo", False), ("dpt", False)],
)
def test_memory_adapts_without_steps_of_its_own(kind, steps):
    assert Component(type=kind).load().has_adaptation_steps() == steps
