"""ProMP is MAML with a penalty before adaptation."""

from dataclasses import replace

import pytest
import torch

from dmrl_ray.learn.per_task import task_log_prob
from tests.algorithms.adaptation_cases import (
    in_double,
    make_algorithm,
    numbers_of,
    one_trial,
    outer_gradient,
    pis,
    slope,
)

SMALL = {"type": "mlp", "hidden_sizes": [3], "activation": "tanh"}


def gradient(promp, trial, old_pi=None):
    """Of ProMP's loss, as at the beginning of an update unless `old_pi` is of other parameters."""
    old_pi = promp.support_pi(trial) if old_pi is None else old_pi
    return outer_gradient(promp, trial, promp.proximal_loss, old_pi)


def proximal_loss(promp, trial, old_pi):
    return promp.proximal_loss(trial, promp.outer_advantage(trial), old_pi)[0]


def moved(algorithm, amount=0.05):
    """As later outer steps see it: no longer at the parameters that acted."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in algorithm.policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += amount * noise


def test_the_likelihood_ratio_is_one_at_the_first_outer_step():
    promp = make_algorithm("promp", inner_steps=2)
    trial = one_trial(promp)
    for params, rollout in zip(promp.adapted_params(trial), trial, strict=True):
        ratio = (task_log_prob(promp.policy, params, rollout).flatten(1) - rollout.log_prob).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio))


@pytest.mark.parametrize("kl_penalty", [0.0, 5.0])
def test_the_first_outer_step_is_mamls_whatever_the_penalty(kl_penalty):
    # The divergence from the policies that acted is zero there, and flat.
    maml = make_algorithm("maml", inner_steps=2, clip=1e6)
    promp = make_algorithm("promp", inner_steps=2, clip=1e6, kl_penalty=kl_penalty)
    trial = one_trial(maml)
    expected, found = outer_gradient(maml, trial), gradient(promp, trial)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_without_penalty_and_clip_later_steps_are_mamls_too():
    maml = make_algorithm("maml", outer="vpg")
    promp = make_algorithm("promp", clip=1e6, kl_penalty=0.0)
    trial = one_trial(maml)
    old_pi = promp.support_pi(trial)
    for algorithm in (maml, promp):
        moved(algorithm)
    expected, found = outer_gradient(maml, trial), gradient(promp, trial, old_pi)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_the_penalty_is_the_divergence_of_every_policy_that_acted_before_the_last_step():
    promp = make_algorithm("promp", SMALL, inner_steps=2, kl_penalty=2.0)
    free = make_algorithm("promp", SMALL, inner_steps=2, kl_penalty=0.0)
    trial = one_trial(promp)
    head, before = promp.policy.policy_head, []
    for params, rollout in zip(promp.adapted_params(trial)[:-1], trial[:-1], strict=True):
        before.append(pis(promp, [params], [rollout])[0].detach())
    old_pi = promp.support_pi(trial)
    for algorithm in (promp, free):
        moved(algorithm)
    after = pis(promp, promp.adapted_params(trial)[:-1], trial[:-1])
    expected = sum(head.kl(old, pi).mean() for old, pi in zip(before, after, strict=True)) / 2
    losses = [proximal_loss(a, trial, old_pi) for a in (promp, free)]
    assert expected > 0.01
    torch.testing.assert_close(losses[0] - losses[1], 2.0 * expected, rtol=1e-4, atol=1e-6)


def test_the_penalised_gradient_equals_finite_differences():
    promp = make_algorithm("promp", SMALL, clip=1e6, kl_penalty=1.0)
    trial = in_double(promp, one_trial(promp, num_tasks=2))
    old_pi = promp.support_pi(trial)
    moved(promp)
    found = gradient(promp, trial, old_pi)
    for name, i, flat in numbers_of(promp.policy, found):
        expected = slope(lambda: proximal_loss(promp, trial, old_pi).item(), flat, i)
        assert found[name].view(-1)[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_heavy_penalty_keeps_the_start_where_it_is():
    distances = []
    for kl_penalty in (0.0, 100.0):
        promp = make_algorithm("promp", kl_penalty=kl_penalty, epochs=20)
        promp.policy.update_obs_norm = lambda *_: None  # they move policies too
        trial = one_trial(promp)
        acted = pis(promp, promp.adapted_params(trial)[:1], trial[:1])[0].detach()
        promp.update(trial)
        after = pis(promp, promp.adapted_params(trial)[:1], trial[:1])[0]
        distances.append(promp.policy.policy_head.kl(acted, after).mean().item())
    assert distances[1] < 0.5 * distances[0]


def test_the_shares_of_several_learners_average_to_the_whole_penalty():
    gradients = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        promp = make_algorithm("promp", kl_penalty=3.0)
        promp.rank, promp.world_size = rank, world_size
        trial = one_trial(promp)
        old_pi = promp.support_pi(trial)
        moved(promp)
        gradients[rank, world_size] = gradient(promp, trial, old_pi)
    for name, whole in gradients[0, 1].items():
        average = (gradients[0, 2][name] + gradients[1, 2][name]) / 2
        torch.testing.assert_close(average, whole, rtol=1e-4, atol=1e-6)


def test_the_penalty_within_a_trial_is_a_mean_over_its_steps():
    promp = make_algorithm("promp", SMALL, "bandit", steps_per_adaptation=2)
    trial = one_trial(promp)
    mask = torch.zeros_like(trial[1].mask)
    mask[0, 0] = True  # Of the second piece a single step counts.
    trial[1] = replace(trial[1], mask=mask, all_count=False)
    params, pi = promp.adapted_params(trial), promp.support_pi(trial)
    old_pi = pi + torch.randn_like(pi)
    kl = promp.policy.policy_head.kl(old_pi, pi)
    counted = torch.cat([r.mask for r in trial[:-1]])
    torch.testing.assert_close(promp.penalty(params, trial, old_pi), kl[counted].mean())
