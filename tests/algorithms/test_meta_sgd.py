"""Meta-SGD learns its inner step sizes."""

import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.spec import JobSpec, build, get_weights, set_weights
from dmrl_ray.learn.per_task import task_log_prob
from tests.algorithms.adaptation_cases import (
    in_double,
    make_algorithm,
    numbers_of,
    one_trial,
    outer_gradient,
    outer_loss,
    slope,
)

SMALL = {"type": "mlp", "hidden_sizes": [3], "activation": "tanh"}


def with_uneven_rates(meta_sgd):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for rate in meta_sgd.rates.values():
            rate += 0.3 * torch.rand(rate.shape, generator=generator)
    return meta_sgd


def test_equal_rates_are_mamls():
    meta_sgd, maml = (make_algorithm(kind, inner_steps=2) for kind in ("meta_sgd", "maml"))
    trial = one_trial(maml)
    for a, b in zip(meta_sgd.adapted_params(trial), maml.adapted_params(trial), strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    found = outer_gradient(meta_sgd, trial)
    for name, expected in outer_gradient(maml, trial).items():
        torch.testing.assert_close(found[name], expected)


def test_the_learner_adapts_exactly_as_the_worker_did_with_rates_that_differ():
    meta_sgd = with_uneven_rates(make_algorithm("meta_sgd", inner_steps=2))
    trial = one_trial(meta_sgd)
    for params, rollout in zip(meta_sgd.adapted_params(trial), trial, strict=True):
        log_prob = task_log_prob(meta_sgd.policy, params, rollout).flatten(1)
        torch.testing.assert_close(log_prob, rollout.log_prob)


def test_rates_travel_to_the_workers_with_the_weights():
    parts = ({"type": "point_goal", "horizon": 5}, {"type": "actor_critic"}, {"type": "meta_sgd"})
    parts = (Component.model_validate(part) for part in parts)
    spec = JobSpec("s", "s", 0, *parts, RolloutSettings(num_envs=40))
    learner, worker = build(spec), build(spec)
    with_uneven_rates(learner.algorithm)
    set_weights(worker.policy, get_weights(learner.policy))
    name = "policy_head/layer/weight"
    there, here = (program.algorithm.rates[name] for program in (worker, learner))
    assert there.std() > 0
    torch.testing.assert_close(there, here)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_of_the_rates_equals_finite_differences(first_order):
    # Also to first order, where the inner gradient is a constant that the rate multiplies.
    meta_sgd = with_uneven_rates(make_algorithm("meta_sgd", SMALL, first_order=first_order))
    trial = in_double(meta_sgd, one_trial(meta_sgd, num_tasks=2))
    gradient = outer_gradient(meta_sgd, trial)
    rates = {name for name in gradient if name.startswith("auxiliary.inner_lr.")}
    assert len(rates) == len(meta_sgd.adapted_params(trial)[0])
    for name, i, flat in numbers_of(meta_sgd.policy, rates):
        expected = slope(lambda: outer_loss(meta_sgd, trial).item(), flat, i)
        assert gradient[name].view(-1)[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("outer", ["clip", "trpo", "vpg"])
def test_an_update_moves_the_rates(outer):
    meta_sgd = make_algorithm("meta_sgd", outer=outer)
    before = {name: rate.detach().clone() for name, rate in meta_sgd.rates.items()}
    meta_sgd.update(one_trial(meta_sgd))
    assert any(not torch.equal(before[name], rate) for name, rate in meta_sgd.rates.items())


def test_only_what_adapts_has_rates():
    meta_sgd = make_algorithm("meta_sgd", trainable=("policy_head",))
    assert {name.partition("/")[0] for name in meta_sgd.rates} == {"policy_head"}
