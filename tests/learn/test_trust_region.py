"""Trust-region steps are natural, and as long as allowed."""

import pytest
import torch
from torch import nn

from dmrl_ray.learn.per_task import task_pi
from dmrl_ray.learn.trust_region import conjugate_gradient, trust_region_step
from tests.algorithms.adaptation_cases import make_algorithm, one_trial, outer_loss


def positive_matrix(size):
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def test_conjugate_gradients_solve_a_linear_system():
    matrix = positive_matrix(6)
    target = torch.arange(6, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, target, iterations=6)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target))


def quadratic(parameter, matrix, slope):
    """A linear loss, and a KL divergence of which the quadratic model is exact."""
    start = parameter.detach().clone()

    def objective():
        moved = parameter - start
        return slope @ parameter, 0.5 * moved @ matrix @ moved

    return objective


def test_where_the_model_is_exact_the_step_is_the_natural_one_and_ends_on_the_border():
    # argmin slope.x with 1/2 x H x <= d is x = -sqrt(2 d / slope H^-1 slope) H^-1 slope.
    matrix, slope = positive_matrix(4), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    parameter = nn.Parameter(torch.ones(4, dtype=torch.float64))
    objective = quadratic(parameter, matrix, slope)
    report = trust_region_step([parameter], objective, max_kl=0.02, damping=1e-9)
    direction = torch.linalg.solve(matrix, slope)
    expected = 1 - (2 * 0.02 / (slope @ direction)).sqrt() * direction
    torch.testing.assert_close(parameter.data, expected, rtol=1e-6, atol=1e-6)
    assert report["kl"] == pytest.approx(0.02, rel=1e-6)


def test_a_step_that_ends_too_far_is_shortened_until_it_does_not():
    # A KL that grows with the fourth power too: the quadratic model's step is too long.
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def objective():
        return -parameter.sum(), (0.5 * parameter**2 + 1e3 * parameter**4).sum()

    report = trust_region_step([parameter], objective, max_kl=0.02, damping=0.0)
    steps = [0.2 * 0.8**i for i in range(15)]
    expected = next(x for x in steps if 0.5 * x**2 + 1e3 * x**4 <= 0.02)
    assert parameter.item() == pytest.approx(expected)
    assert 0 < report["kl"] <= 0.02


def test_where_no_step_is_better_the_parameters_stay():
    parameter = nn.Parameter(torch.ones(1))
    calls = []

    def objective():
        calls.append(parameter.item())
        worse = (parameter - 1).square().sum() * 1e6
        return -parameter.sum() + worse, 0.5 * (parameter - 1).square().sum()

    assert trust_region_step([parameter], objective, max_kl=10.0)["kl"] == 0.0
    assert parameter.item() == 1.0
    assert len(calls) == 1 + 15


@pytest.mark.parametrize("tasks", ["point_goal", "bandit"])
def test_mamls_step_lowers_its_loss_and_keeps_the_adapted_policies_near(tasks):
    maml = make_algorithm("maml", tasks=tasks, outer="trpo", max_kl=0.01)
    maml.policy.update_obs_norm = lambda *_: None  # they move policies too
    trial = one_trial(maml)
    query = task_pi(maml.policy, maml.adapted_params(trial)[-1], trial[-1]).detach()
    before = outer_loss(maml, trial).item()
    metrics = maml.update(trial)
    after = outer_loss(maml, trial).item()
    moved = task_pi(maml.policy, maml.adapted_params(trial)[-1], trial[-1])
    kl = maml.policy.policy_head.kl(query, moved).mean().item()
    assert after < before
    assert 0 < kl <= 0.01 + 1e-6
    assert metrics["kl"] == pytest.approx(kl, rel=1e-3)


def test_a_wider_region_is_a_longer_step():
    lengths = []
    for max_kl in (1e-4, 1e-2):
        maml = make_algorithm("maml", outer="trpo", max_kl=max_kl)
        before = nn.utils.parameters_to_vector(maml.policy.parameters()).detach()
        maml.update(one_trial(maml))
        lengths.append((nn.utils.parameters_to_vector(maml.policy.parameters()) - before).norm())
    assert 3 * lengths[0] < lengths[1]


def test_every_learner_takes_the_whole_step():
    ends = []
    for rank, world_size in ((0, 1), (1, 2)):
        maml = make_algorithm("maml", outer="trpo")
        maml.rank, maml.world_size = rank, world_size
        maml.update(one_trial(maml))
        ends.append(nn.utils.parameters_to_vector(maml.policy.parameters()))
    torch.testing.assert_close(*ends)


def test_an_advantage_that_is_not_a_number_leaves_the_policy_as_it_is():
    maml = make_algorithm("maml", outer="trpo")
    trial = one_trial(maml)
    trial[-1].advantage[0, 0] = torch.nan
    before = nn.utils.parameters_to_vector(maml.policy.parameters()).detach()
    maml.update(trial)
    after = nn.utils.parameters_to_vector(maml.policy.parameters())
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert maml.skipped_batches == 1
