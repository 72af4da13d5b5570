"""Soft actor-critic: what each loss moves, and where it goes on from."""

import numpy as np
import pytest
import torch
from torch import nn

from dmrl_ray.algorithms.sac import ACTOR, CRITIC, TEMPERATURE
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights, build
from dmrl_ray.jobs.worker import CollectCall, EvaluateCall, RolloutWorker
from dmrl_ray.networks.critics import CriticEnsemble

SMALL = {"type": "mlp", "hidden_sizes": [8]}


def make_spec(kind="sac", tasks="point_goal", encoder=SMALL, num_envs=4, **settings):
    small = {"gradient_steps": 3, "batch_trials": 3, "batch_steps": 4, "critic_hidden_sizes": [8]}
    parts = (
        tasks if isinstance(tasks, dict) else {"type": tasks},
        {"type": "actor_critic", "encoder": encoder},
        {"type": kind, **small, **settings},
    )
    components = (Component.model_validate(part) for part in parts)
    return JobSpec("s", "s", 0, *components, RolloutSettings(num_envs=num_envs))


def trained(spec, updates=2):
    """A learner after some updates, and the trial that comes next."""
    learner, worker, state = Learner(spec), RolloutWorker(), {}
    for i in range(updates + 1):
        weights = Weights(i, learner.weights())
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
        if i < updates:
            learner.update(i, 0, [trial])
    return learner, trial


def gradients(algorithm):
    """Of the losses of one step, by the parts that they move; nothing is moved."""
    found = {}

    def step(loss, parts):
        moving = {n: p for n, p in algorithm.policy.named_parameters() if n.startswith(parts)}
        every = torch.autograd.grad(
            loss, list(moving.values()), retain_graph=True, allow_unused=True
        )
        found[parts] = dict(zip(moving, every, strict=True))
        return torch.zeros(())

    algorithm.step_optimizer, algorithm.rng = step, np.random.default_rng(0)
    kept = {n: x.clone() for n, x in algorithm.policy.state_dict().items()}
    algorithm.gradient_step()
    algorithm.policy.load_state_dict(kept)  # the targets moved
    del algorithm.step_optimizer
    return {name: g for part in found.values() for name, g in part.items()}


def assert_resumes(spec):
    learner, trial = trained(spec)
    again = Learner(spec)
    again.set_state(learner.get_state())
    for one in (learner, again):
        one.update(2, 0, [trial])
    weights = again.weights()
    for name, array in learner.weights().items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


def assert_shares_average_to_the_whole(algorithm):
    whole, parts = gradients(algorithm), []
    for rank in range(2):  # of 3 trials in a batch, one learner has two and the other one
        algorithm.rank, algorithm.world_size = rank, 2
        parts.append(gradients(algorithm))
    for name, expected in whole.items():
        average = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("tasks", ["point_goal", "cartpole"])
def test_a_learner_from_a_checkpoint_goes_on_bit_for_bit(tasks):
    assert_resumes(make_spec(tasks=tasks))


@pytest.mark.parametrize("tasks", ["point_goal", "cartpole"])
def test_the_shares_of_several_learners_average_to_the_whole_gradient(tasks):
    assert_shares_average_to_the_whole(trained(make_spec(tasks=tasks))[0].algorithm)


def test_an_ensemble_is_its_critics_one_by_one():
    torch.manual_seed(0)
    ensemble, x = CriticEnsemble(5, 3, (7, 6)), torch.randn(2, 4, 5)
    for k, q in enumerate(ensemble(x)):
        layers = []
        for i in range(3):
            layer = nn.Linear(*ensemble.get_parameter(f"weight{i}")[k].shape)
            layer.weight.data = ensemble.get_parameter(f"weight{i}")[k].T
            layer.bias.data = ensemble.get_parameter(f"bias{i}")[k, 0]
            layers += [layer, nn.ReLU()]
        torch.testing.assert_close(q, nn.Sequential(*layers[:-1])(x))


def test_targets_average_the_critics_by_tau_and_are_moved_by_nothing_else():
    learner, trial = trained(make_spec(gradient_steps=1, tau=0.25))
    algorithm = learner.algorithm
    before = algorithm.models.targets.weight0.clone()
    learner.update(2, 0, [trial])
    expected = 0.75 * before + 0.25 * algorithm.models.critics.weight0
    torch.testing.assert_close(algorithm.models.targets.weight0, expected)
    assert not any("targets" in name for name in algorithm.names)


def test_the_policys_loss_is_minus_the_soft_value_at_fixed_critics():
    # Its gradient reaches the policy through the action; the critics' own comes from their loss.
    algorithm = trained(make_spec(temperature=0.1))[0].algorithm
    found = gradients(algorithm)
    assert found["policy_head.layer.weight"].abs().sum() > 0
    assert found["auxiliary.critics.weight0"].abs().sum() > 0


@pytest.mark.parametrize(("temperature", "moves"), [(None, True), (0.3, False)])
def test_a_given_temperature_stays(temperature, moves):
    algorithm = trained(make_spec(temperature=temperature))[0].algorithm
    began = 1.0 if temperature is None else temperature
    assert (abs(algorithm.models.temperature().item() - began) > 1e-4) == moves


def test_each_loss_has_a_gradient_clipped_by_its_own_norm():
    # Three gradients longer than 1e-4, each shortened to it: their steps are 0.5 * 1e-4 long.
    spec = make_spec(optimizer="sgd", lr=0.5, max_grad_norm=1e-4, gradient_steps=1)
    learner, trial = trained(spec, updates=0)
    before = learner.weights()
    learner.update(0, 0, [trial])
    after = learner.weights()
    for part in (CRITIC, ACTOR, TEMPERATURE):
        moved = [after[n] - x for n, x in before.items() if n.startswith(part)]
        length = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in moved))
        assert length == pytest.approx(0.5e-4, rel=0.01)


def test_frozen_critics_leave_the_policy_to_learn():
    spec = make_spec()
    learner, trial = trained(spec, updates=0)
    learner.algorithm.prepare_training(("encoder", "policy_head"))
    before = learner.weights()
    learner.update(0, 0, [trial])
    moved = {n for n, x in learner.weights().items() if not np.array_equal(x, before[n])}
    assert any(name.startswith("policy_head") for name in moved)
    assert not any("critics" in name for name in moved)


def test_a_policy_with_memory_is_refused():
    with pytest.raises(ValueError, match=r"network\.encoder.*found memory"):
        build(make_spec(encoder={"type": "lstm", "hidden_size": 4}))


@pytest.mark.slow
def test_sac_finds_a_goal_that_it_sees():
    tasks = {"type": "observe", "of": {"type": "point_goal", "horizon": 20}}
    encoder = {"type": "mlp", "hidden_sizes": [64, 64]}
    spec = make_spec(
        tasks=tasks,
        encoder=encoder,
        num_envs=32,
        **dict(batch_trials=64, batch_steps=4, critic_hidden_sizes=[64, 64]),
        **dict(gradient_steps=32, gamma=0.9, lr=3e-3, reward_scale=10.0),
    )
    learner, _ = trained(spec, updates=20)
    goals = tuple(learner.algorithm.distribution.sample(np.random.default_rng(0), 50, "test"))
    call = EvaluateCall(spec, goals, 0, 0, True, 0)
    rows = RolloutWorker().evaluate(call, Weights(0, learner.weights()))
    assert rows["score"].mean() > 0.9
