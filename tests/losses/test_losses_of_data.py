"""Losses of imitation and of representation: numbers worked out by hand, and closed forms."""

import math

import pytest
import torch

from dmrl_ray.learn.pca import ProbabilisticPCA
from dmrl_ray.losses.imitation import discriminator_loss, expert_action_loss, imitation_reward
from dmrl_ray.losses.representation import negative_evidence_bound


def f(values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_of_imitation_is_the_cross_entropy_to_the_experts_actions():
    # probabilities 1/2 and 1/8 of the expert's actions; the third step does not count
    log_prob = f([0.5, 0.125, 0.9]).log()
    loss = expert_action_loss(log_prob, mask=torch.tensor([True, True, False]))
    assert float(loss) == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_a_discriminator_that_knows_nothing_loses_log_four():
    assert float(discriminator_loss(f([0.0, 0.0]), f([0.0]))) == pytest.approx(math.log(4))


def test_the_discriminators_loss_by_hand():
    # D = 3/4 on the expert's step, 1/4 and 1/2 on the policy's:
    # -log(3/4) - (log(3/4) + log(1/2)) / 2
    loss = discriminator_loss(f([math.log(3)]), f([-math.log(3), 0.0]))
    expected = -math.log(0.75) - (math.log(0.75) + math.log(0.5)) / 2
    assert float(loss) == pytest.approx(expected)


def test_the_reward_is_minus_the_log_of_not_being_the_experts():
    # D = 3/4: -log(1/4)
    assert float(imitation_reward(f(math.log(3)))) == pytest.approx(math.log(4))
    assert float(imitation_reward(f(-50.0))) == pytest.approx(0.0, abs=1e-12)


def test_the_evidence_bound_by_hand():
    # |x - r|^2 = 1 + 4; KL(N(1, 4) || N(0, 1)) = (4 + 1 - 1 - log 4) / 2
    bound = negative_evidence_bound(
        f([1.0, 2.0]), f([0.0, 0.0]), f([1.0]), f([math.log(4)]), beta=0.5
    )
    kl = (4 - math.log(4)) / 2
    assert float(bound) == pytest.approx(2.5 + math.log(2 * math.pi) + 0.5 * kl)


def test_the_bound_is_never_above_the_evidence():
    # A linear decoder x = w z + noise of variance 1: the evidence is N(x; 0, w^2 + 1), and the
    # bound meets it at the exact posterior N(w x / (w^2 + 1), 1 / (w^2 + 1)).
    w, x = 1.5, f([[0.7]])
    variance = 1 / (w * w + 1)
    mean, log_var = w * x * variance, torch.full_like(x, math.log(variance))
    noise = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0)).double()
    z = mean + math.sqrt(variance) * noise
    many = x.expand_as(z)
    bound = negative_evidence_bound(many, w * z, mean.expand_as(z), log_var.expand_as(z)).mean()
    evidence = -0.5 * (0.7**2 / (w * w + 1) + math.log(2 * math.pi * (w * w + 1)))
    assert float(-bound) == pytest.approx(evidence, abs=5e-3)
    worse = negative_evidence_bound(
        many, w * (z + 0.5), (mean + 0.5).expand_as(z), log_var.expand_as(z)
    )
    assert float(-worse.mean()) < evidence - 0.1


def rows(n=500):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(2, 5, generator=generator).double()
    z = torch.randn(n, 2, generator=generator).double()
    return 3 + z @ mixing + 0.3 * torch.randn(n, 5, generator=generator).double()


def test_principal_components_explain_all_but_the_smallest_eigenvalues():
    x = rows()
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    model = ProbabilisticPCA.fit(x, 2)
    assert float(model.noise_variance) == pytest.approx(float(values[:3].mean()))
    error = (model.reconstruct(x) - x).square().sum(1).mean()
    assert float(error) == pytest.approx(float(values[:3].sum()))


def test_the_likelihood_is_that_of_the_gaussian_with_the_models_covariance():
    x = rows()
    model = ProbabilisticPCA.fit(x, 2)
    covariance = model.basis @ model.basis.T + model.noise_variance * torch.eye(5)
    gaussian = torch.distributions.MultivariateNormal(model.mean, covariance)
    torch.testing.assert_close(model.log_likelihood(x), gaussian.log_prob(x))


def test_no_other_model_of_that_size_is_likelier():
    # The closed form is the maximum: every small step away from it lowers the likelihood.
    x, generator = rows(), torch.Generator().manual_seed(2)
    best = ProbabilisticPCA.fit(x, 2)
    for _ in range(20):
        basis = best.basis + 0.05 * torch.randn(5, 2, generator=generator).double()
        other = ProbabilisticPCA(best.mean, basis, best.noise_variance)
        assert other.log_likelihood(x).mean() < best.log_likelihood(x).mean()


def test_a_model_as_wide_as_the_data_is_refused():
    with pytest.raises(ValueError, match="from 1 to 4"):
        ProbabilisticPCA.fit(rows(), 5)
