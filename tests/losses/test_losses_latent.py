"""Divergences and samples of diagonal Gaussians, against numbers worked out by hand."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dmrl_ray.losses.latent import chained_kl, gaussian_kl, gaussian_sample, reconstruction_loss


def f(x):
    return torch.tensor(x, dtype=torch.float64)


def random_gaussians(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))


def test_kl_by_hand():
    # N(1, 4) from N(0, 1):  1/2 (0 - ln 4 - 1 + (4 + 1) / 1) = 2 - ln 2.
    # N(0, 1) from N(2, 4):  1/2 (ln 4 - 0 - 1 + (1 + 4) / 4) = ln 2 + 1/8.
    kl = gaussian_kl(f([[1.0, 0.0]]), f([[math.log(4), 0]]), f([[0.0, 2.0]]), f([[0, math.log(4)]]))
    torch.testing.assert_close(kl, f([2 - math.log(2) + math.log(2) + 1 / 8]))


def test_kl_is_that_of_torch():
    mean, log_var = random_gaussians(0, 3, 4, 5)
    prior_mean, prior_log_var = random_gaussians(1, 3, 4, 5)
    normals = Normal(mean, (log_var / 2).exp()), Normal(prior_mean, (prior_log_var / 2).exp())
    kl = gaussian_kl(mean, log_var, prior_mean, prior_log_var)
    torch.testing.assert_close(kl, kl_divergence(*normals).sum(-1))


def test_kl_to_itself_is_zero():
    mean, log_var = random_gaussians(0, 6, 5)
    torch.testing.assert_close(gaussian_kl(mean, log_var, mean, log_var), torch.zeros(6).double())


def test_kl_wants_one_shape():
    with pytest.raises(ValueError, match=r"prior_log_var has shape \(2,\)"):
        gaussian_kl(f([0.0]), f([0.0]), f([0.0]), f([0.0, 0.0]))


def test_a_posterior_that_stays_costs_only_once():
    # N(1, 1) from N(0, 1) is 1/2, and then nothing changes.
    mean = torch.ones(3, 1, 1)
    torch.testing.assert_close(
        chained_kl(mean, torch.zeros_like(mean)), torch.tensor([[0.5], [0.0], [0.0]])
    )


def test_each_posterior_is_measured_from_the_one_before():
    # Means 0, 2, 3 of variances 1, 1, 4: 0, then 4/2, then 1/2 (4 - 1 - ln 4 + 1) = 2 - ln 2.
    kl = chained_kl(f([[[0.0]], [[2.0]], [[3.0]]]), f([[[0.0]], [[0.0]], [[math.log(4)]]]))
    torch.testing.assert_close(kl, f([[0.0], [2.0], [2 - math.log(2)]]))


def test_samples_have_the_mean_and_variance_asked_for():
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0)).double()
    sample = gaussian_sample(f([3.0]), f([math.log(0.25)]), noise)
    assert sample.mean().item() == pytest.approx(3, abs=0.01)
    assert sample.std().item() == pytest.approx(0.5, abs=0.01)


def test_gradients_pass_through_a_sample():
    mean, log_var = f([1.0]).requires_grad_(), f([math.log(4)]).requires_grad_()
    gaussian_sample(mean, log_var, f([3.0])).sum().backward()
    # d(mean + e^(log_var / 2) noise) / d log_var = std noise / 2 = 3.
    assert (mean.grad.item(), log_var.grad.item()) == (1.0, pytest.approx(3.0))


def test_reconstruction_by_hand():
    # Two steps of one trial; errors 1 and 2 of the first sample, 0 and 1 of the second:
    # (1 + 4 + 0 + 1) / 2 samples = 3.
    predicted = f([1.0, 3.0, 0.0, 2.0]).reshape(2, 2, 1, 1)
    target = f([0.0, 1.0]).reshape(2, 1, 1)
    torch.testing.assert_close(reconstruction_loss(predicted, target, binary=False), f(3.0))


def test_binary_reconstruction_by_hand():
    # Logit ln 3 is a probability of 3/4. Reward 1 is positive, -0.1 is not: -ln(3/4 * 1/4).
    predicted = torch.full((1, 2, 1, 1), math.log(3)).double()
    target = f([1.0, -0.1]).reshape(2, 1, 1)
    expected = f(-math.log(3 / 16))
    torch.testing.assert_close(reconstruction_loss(predicted, target, binary=True), expected)
