import numpy as np
import pytest

from dmrl_ray.envs.restless_bandit import RestlessBandit
from dmrl_ray.envs.restless_oracle import (
    CELLS,
    GRID,
    DriftFilter,
    drift,
    filter_return,
    rescorla_wagner_return,
    thompson_return,
    ucb_return,
)


def played_by_the_expert(num_envs=5000, **settings):
    """The environment after a trial of the expert, and its returns (B,)."""
    family = RestlessBandit(RestlessBandit.Config(**settings))
    env = family.make_vec(num_envs)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks(family.sample(np.random.default_rng(1), num_envs, "test"))
    env.reset()
    total = sum(env.step(env.expert_action())[1] for _ in range(family.max_episode_steps))
    return family, env, total


def test_the_return_of_the_expert_action_is_the_reference():
    family, _, total = played_by_the_expert()
    oracle = family.reference(None).oracle[0]
    assert total.mean() == pytest.approx(oracle, abs=4 * total.std() / np.sqrt(5000))


def test_a_drift_that_stands_still_is_the_stationary_bandit():
    # Arms p and 1 - p with p uniform: regret 1.221 of 75 at 100 pulls.
    assert filter_return(100, (0.0,)) == pytest.approx(75 - 1.221, abs=0.4)


def test_the_filter_applies_bayes_rule_and_then_the_drift():
    model = DriftFilter((0.0, 0.1))
    after = model.after(model.prior(1), np.array([True]))
    np.testing.assert_allclose(after[0, 0], GRID / GRID.sum() / 2, rtol=1e-5)  # no drift
    np.testing.assert_allclose(after.sum(axis=2), [[0.5, 0.5]], rtol=1e-5)  # volatility unchanged
    assert 0.5 < model.mean(after)[0] < 2 / 3


def test_the_filter_is_calibrated():
    # A fraction m of the pulls with a posterior mean near m is rewarded.
    rng, model = np.random.default_rng(0), DriftFilter((0.03, 0.2))
    reward_prob = drift(rng.choice([0.03, 0.2], 4000), 40, rng)
    posterior, means, wins = model.prior(4000), [], []
    for p in reward_prob.T:
        first = rng.random(4000) < p
        means.append(model.mean(posterior))
        wins.append(first)
        posterior = model.after(posterior, first)
    means, wins = np.concatenate(means), np.concatenate(wins)
    for low in np.arange(0.1, 0.9, 0.1):
        inside = (means >= low) & (means < low + 0.1)
        assert wins[inside].mean() == pytest.approx(means[inside].mean(), abs=0.02)


def test_the_volatility_is_inferred():
    family = RestlessBandit(RestlessBandit.Config(pulls=100))
    env = family.make_vec(2000)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    tasks = family.sample(np.random.default_rng(1), 2000, "test")
    env.set_tasks(tasks)
    env.reset()
    for _ in range(99):
        env.step(env.expert_action())
    fast = np.array([task.params["volatility"] == 0.2 for task in tasks])
    posterior = env.belief()[:, CELLS : 2 * CELLS].sum(axis=1)
    assert posterior[fast].mean() > 0.65
    assert posterior[~fast].mean() < 0.35


def test_drifts_have_their_volatility_and_stay_inside():
    walk = drift(np.full(4000, 0.03), 50, np.random.default_rng(0))
    assert walk.min() >= 0
    assert walk.max() <= 1
    inside = (walk[:, :-1] > 0.2) & (walk[:, :-1] < 0.8)
    assert np.diff(walk, axis=1)[inside].std() == pytest.approx(0.03, rel=0.02)
    assert walk[:, -1].mean() == pytest.approx(0.5, abs=0.02)


def test_classic_rules_rank_as_published():
    # Wang et al. 2016: all have a lower return than the filter; the best fixed learning rate
    # of Rescorla and Wagner's rule is 0.5.
    rng = np.random.default_rng(0)
    reward_prob = drift(rng.choice([0.03, 0.2], 4000), 100, rng)
    rates = {rate: rescorla_wagner_return(reward_prob, rng, rate) for rate in (0.1, 0.5)}
    assert rates[0.5] == pytest.approx(66.5, abs=0.4)
    assert rates[0.5] > rates[0.1] + 1
    assert ucb_return(reward_prob, rng) == pytest.approx(66.7, abs=0.4)
    assert thompson_return(reward_prob, 0.115, rng) == pytest.approx(63.4, abs=0.5)
    assert filter_return(100, (0.03, 0.2)) == pytest.approx(68.3, abs=0.3)
