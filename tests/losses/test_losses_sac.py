"""Soft actor-critic by hand, and the squashed Gaussian against torch's."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

from dmrl_ray.losses.distributions import squashed_gaussian_log_prob
from dmrl_ray.losses.latent import product_of_gaussians
from dmrl_ray.losses.soft_actor_critic import (
    categorical_soft_value,
    soft_q_loss,
    soft_q_target,
    soft_value,
    temperature_loss,
)
from dmrl_ray.networks.heads import SquashedGaussianHead

HALF = torch.tensor(0.5)


def head(actions=2):
    return SquashedGaussianHead(torch.nn.Identity(), actions)


def some_pi(*shape, actions=2):
    torch.manual_seed(0)
    return torch.cat([torch.randn(*shape, actions), 0.5 * torch.randn(*shape, actions) - 0.5], -1)


def test_the_smaller_of_two_values_counts_and_entropy_is_worth_the_temperature():
    # min(3, 2) - 0.5 * -1 = 2.5; min(1, 4) - 0.5 * 2 = 0
    q, log_prob = torch.tensor([[3.0, 1.0], [2.0, 4.0]]), torch.tensor([-1.0, 2.0])
    assert soft_value(q, log_prob, HALF).tolist() == [2.5, 0.0]


def test_over_discrete_actions_the_value_is_the_expectation_of_the_sampled_one():
    torch.manual_seed(0)
    q, logits = torch.randn(2, 5, 3), torch.randn(5, 3)
    log_pi = logits.log_softmax(-1)
    each = torch.stack([soft_value(q[..., a], log_pi[:, a], HALF) for a in range(3)], -1)
    expected = (log_pi.exp() * each).sum(-1)
    torch.testing.assert_close(categorical_soft_value(q, logits, HALF), expected)


def test_the_soft_optimal_policy_has_the_value_log_sum_exp():
    # pi = softmax(Q / t) maximises; its value is t * logsumexp(Q / t).
    q = torch.tensor([[1.0, -2.0, 0.5]])
    value = categorical_soft_value(q, q[0] / 0.5, HALF)
    assert value.item() == pytest.approx(0.5 * (q[0] / 0.5).logsumexp(0).item(), rel=1e-6)


def test_only_termination_ends_what_is_bootstrapped():
    # 1 + 0.5 * 4 = 3; the terminated step is worth its reward, even after a value without sense.
    target = soft_q_target(
        torch.tensor([1.0, 1.0]),
        torch.tensor([4.0, torch.inf]),
        torch.tensor([False, True]),
        gamma=0.5,
    )
    assert target.tolist() == [3.0, 1.0]


def test_targets_carry_no_gradient():
    value = torch.ones(1, requires_grad=True)
    target = soft_q_target(torch.ones(1), value, torch.zeros(1, dtype=torch.bool), gamma=0.9)
    assert not target.requires_grad


def test_targets_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="next_value has shape"):
        soft_q_target(torch.ones(2), torch.ones(2, 1), torch.zeros(2).bool(), gamma=0.9)


def test_the_errors_of_all_critics_add_up():
    # 0.5 * ((1 - 3)^2 + (6 - 3)^2) = 6.5
    q = torch.tensor([[1.0], [6.0]])
    assert soft_q_loss(q, torch.tensor([3.0])).tolist() == [6.5]


@pytest.mark.parametrize(("entropy", "rises"), [(-3.0, True), (1.0, False)])
def test_the_temperature_rises_while_entropy_is_below_its_target(entropy, rises):
    log_temperature = torch.zeros((), requires_grad=True)
    temperature_loss(log_temperature, torch.tensor([entropy]), target=-1.0).mean().backward()
    assert (log_temperature.grad < 0) == rises
    assert abs(log_temperature.grad) == 2.0


def test_the_squashed_density_is_that_of_torch():
    mean, log_std = some_pi(7).chunk(2, -1)
    unsquashed = torch.randn(7, 2)
    base = Normal(mean, log_std.exp())
    squashed = TransformedDistribution(base, [TanhTransform(cache_size=1)])
    expected = squashed.log_prob(unsquashed.tanh()).sum(-1)
    ours = squashed_gaussian_log_prob(mean, log_std, unsquashed)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_squashed_density_stays_finite_where_tanh_rounds_to_one():
    # log N(20; 20, 1) = -0.919; log(1 - tanh(20)^2) = 2 (log 2 - 20) = -38.614
    value = squashed_gaussian_log_prob(
        torch.tensor([20.0]), torch.tensor([0.0]), torch.tensor([20.0])
    )
    assert value.item() == pytest.approx(-0.9189 + 38.6137, abs=1e-3)


def test_the_squashed_density_integrates_to_one():
    pi = torch.tensor([0.3, -0.7])
    grid = torch.linspace(-1, 1, 100_001)[1:-1].unsqueeze(-1)
    density = head(1).log_prob(pi.expand(len(grid), 2), grid).exp()
    assert density.sum().item() * 2e-5 == pytest.approx(1, abs=1e-3)


def test_a_recorded_action_has_the_log_prob_it_was_sampled_with():
    pi, noise = some_pi(20), head().noise(np.random.default_rng(0), 1, 20)[0]
    action, log_prob = head().sample_with_log_prob(pi, noise)
    torch.testing.assert_close(head().log_prob(pi, action), log_prob, rtol=1e-3, atol=1e-3)
    assert torch.equal(action, head().sample(pi, noise))


def test_an_action_that_rounding_put_on_the_border_has_a_finite_log_prob():
    assert torch.isfinite(head(1).log_prob(torch.tensor([[5.0, 0.0]]), torch.ones(1, 1))).all()


def test_the_entropy_is_minus_the_mean_log_prob():
    pi = some_pi(3)
    noise = head().noise(np.random.default_rng(0), 200_000, 3)
    _, log_prob = head().sample_with_log_prob(pi, noise)
    torch.testing.assert_close(head().entropy(pi), -log_prob.mean(0), rtol=0, atol=0.02)


def test_an_empty_context_leaves_the_prior():
    mean, log_var = product_of_gaussians(torch.zeros(4, 0, 3), torch.zeros(4, 0, 3))
    assert not mean.any()
    assert not log_var.any()


def test_a_product_of_gaussians_by_hand():
    # Prior N(0, 1), factors N(2, 1/3) and N(-1, 1/4): precision 1 + 3 + 4 = 8, mean (6 - 4) / 8.
    precision, means = torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0], [-1.0]])
    mean, log_var = product_of_gaussians(precision, precision * means)
    assert mean.tolist() == [0.25]
    assert log_var.item() == pytest.approx(-np.log(8))
