import numpy as np
import pytest

from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.envs.bandit_oracle import (
    KNOWN,
    bayes_optimal_return,
    exact_return,
    gittins_return,
    thompson_return,
    ucb1_return,
)
from dmrl_ray.envs.bandit_priors import PAIRS, dependent_return, posterior_mean
from dmrl_ray.envs.gittins import GittinsTable, gittins_table
from dmrl_ray.types import Task


def task(reward_prob):
    return Task("a", "bandit", "train", {"chance": np.array(reward_prob)})


def by_enumeration(arms, pulls):
    """The optimum by trying every action after every history, without merging or caching."""
    if pulls == 0:
        return 0.0

    def value(history, left):
        if left == 0:
            return 0.0
        best = 0.0
        for arm in range(arms):
            won = [w for a, w in history if a == arm]
            p = (1 + sum(won)) / (2 + len(won))
            win = 1 + value([*history, (arm, 1)], left - 1)
            best = max(best, p * win + (1 - p) * value([*history, (arm, 0)], left - 1))
        return best

    return value([], pulls)


@pytest.mark.parametrize(("arms", "pulls"), [(2, 1), (2, 5), (3, 4), (4, 3)])
def test_the_exact_optimum_is_that_of_full_enumeration(arms, pulls):
    assert exact_return(arms, pulls) == pytest.approx(by_enumeration(arms, pulls), abs=1e-12)


@pytest.mark.parametrize("cell", [(2, 10), (5, 10), (10, 10), (50, 10), (2, 20), (2, 100)])
def test_tabulated_optima_are_the_exact_ones(cell):
    assert KNOWN[cell] == pytest.approx(exact_return(*cell), abs=6e-4)


def test_gittins_indices_of_the_last_two_pulls_by_hand():
    # One pull left: the mean, 1/2. Two left at (0, 0), continuing after a win with mean 2/3:
    # 1/2 - x + (2/3 - x) / 2 = 0, so x = 5/9.
    none = np.zeros(1, int)
    assert GittinsTable(2)(1, none, none) == pytest.approx(1 / 2, abs=1e-4)
    assert GittinsTable(2)(2, none, none) == pytest.approx(5 / 9, abs=1e-4)


def test_gittins_indices_are_those_of_the_recursion():
    # W(s, f, r) = max(0, p - x + p W(s + 1, f, r - 1) + (1 - p) W(s, f + 1, r - 1)), by bisection.
    def value(wins, losses, left, charge):
        if left == 0:
            return 0.0
        p = (wins + 1) / (wins + losses + 2)
        win, loss = (value(wins + w, losses + 1 - w, left - 1, charge) for w in (1, 0))
        return max(0.0, p - charge + p * win + (1 - p) * loss)

    table = GittinsTable(9)
    for wins, losses, left in [(0, 0, 9), (1, 2, 6), (4, 0, 5), (0, 3, 4), (2, 2, 1)]:
        low, high = 0.0, 1.0
        for _ in range(15):
            middle = (low + high) / 2
            positive = value(wins, losses, left, middle) > 0
            low, high = (middle, high) if positive else (low, middle)
        index = table(left, np.array([wins]), np.array([wins + losses]))[0]
        assert index == pytest.approx(low, abs=3e-4)


def test_the_index_of_an_arm_beyond_the_table_is_its_mean():
    index = gittins_table(10)(np.full((1, 1), 10), np.array([[30, 0]]), np.array([[40, 0]]))
    assert index[0, 0] == pytest.approx(31 / 42)
    assert index[0, 1] > 0.6


def test_the_return_of_the_index_policy_is_almost_the_optimum():
    assert gittins_return(2, 20) == pytest.approx(exact_return(2, 20), rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "tolerance"), [((5, 100), 0.2), ((10, 100), 0.2), ((50, 100), 0.2)]
)
def test_tabulated_gittins_returns_are_those_of_another_simulation(cell, tolerance):
    assert gittins_return(*cell, seed=1) == pytest.approx(KNOWN[cell], abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "least"), [((5, 100), 78.5), ((50, 500), 464.5)])
def test_the_return_of_the_expert_action_is_almost_the_optimum(cell, least):
    # As in `simulated_return`: summed reward probabilities, with the best arm as control variate.
    arms, pulls = cell
    family = Bandit(Bandit.Config(arms=arms, pulls=pulls))
    env = family.make_vec(4000)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks(family.sample(np.random.default_rng(1), 4000, "test"))
    env.reset()
    reward_prob, total = env.reward_prob.copy(), np.zeros(4000)
    for _ in range(pulls):
        action = env.expert_action()
        total += reward_prob[np.arange(4000), action]
        env.step(action)
    best = reward_prob.max(axis=1)
    slope = np.cov(total, best)[0, 1] / best.var(ddof=1)
    assert total.mean() - slope * (best.mean() - arms / (arms + 1)) > least


@pytest.mark.slow
def test_the_tabulated_optimum_of_20_pulls_is_exact():
    assert KNOWN[5, 20] == pytest.approx(exact_return(5, 20), abs=1e-4)


def test_returns_of_classic_baselines_are_the_published_ones():
    # Duan et al. 2016, table 1, has 74.7 for Thompson sampling at (100, 5); 75.1 +- 0.1 here.
    # UCB1 with c = 0.2 has 78.4.
    rng = np.random.default_rng(0)
    assert thompson_return(5, 100, 4000, rng) == pytest.approx(75.0, abs=0.6)
    assert ucb1_return(5, 100, 4000, rng) == pytest.approx(78.4, abs=0.6)


def test_there_is_no_reference_where_the_oracle_is_too_expensive():
    assert bayes_optimal_return(3, 5000) is None
    assert Bandit(Bandit.Config(arms=3, pulls=5000)).reference(task([0, 0, 1])) is None


def test_rewards_come_with_the_probability_of_the_arm_pulled():
    env = Bandit(Bandit.Config(arms=3, pulls=10)).make_vec(3)
    env.np_random = np.random.default_rng(0)
    env.set_tasks([task([0.0, 1.0, 0.3])] * 3)
    env.reset()
    total = sum(env.step(np.array([0, 1, 2]))[1] for _ in range(2000))
    assert total[0] == 0
    assert total[1] == 2000
    assert total[2] == pytest.approx(600, abs=5 * np.sqrt(2000 * 0.3 * 0.7))


def test_random_pulls_score_zero_and_the_optimum_one():
    reference = Bandit(Bandit.Config()).reference(task([0.5] * 5))
    score = reference.score(np.array([0, 0]), np.array([5.0, 6.66]))
    np.testing.assert_allclose(score, [0, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("prior", "mean_best", "regret"),
    [
        ("correlated_uniform", 0.75, 1.221),
        ("easy", 0.9, 0.625),
        ("medium", 0.75, 1.000),
        ("hard", 0.6, 2.312),
    ],
)
def test_regrets_of_dependent_arms_are_the_known_optima(prior, mean_best, regret):
    assert 100 * mean_best - dependent_return(prior, 100) == pytest.approx(regret, abs=6e-4)


@pytest.mark.parametrize("prior", ["correlated_uniform", "hard"])
def test_the_return_of_the_expert_on_dependent_arms_is_the_optimum(prior):
    family = Bandit(Bandit.Config(arms=2, pulls=20, prior=prior))
    env = family.make_vec(20_000)
    env.np_random = np.random.default_rng(0)
    env.tracks_belief = True
    env.set_tasks(family.sample(np.random.default_rng(1), 20_000, "test"))
    env.reset()
    total = sum(env.step(env.expert_action())[1] for _ in range(20))
    oracle = family.reference(None).oracle[0]
    assert total.mean() == pytest.approx(oracle, abs=4 * total.std() / np.sqrt(20_000))


def test_posterior_means_by_bayes_rule():
    # Three pulls of p: two wins; one pull of 1 - p: a loss, which is evidence as a win of p is.
    wins, pulled = np.array([2, 0]), np.array([3, 1])
    for prior, high in PAIRS.items():
        for_high, for_low = high**3 * (1 - high), (1 - high) ** 3 * high
        p = (high * for_high + (1 - high) * for_low) / (for_high + for_low)
        np.testing.assert_allclose(posterior_mean(prior, wins, pulled), [p, 1 - p])
    np.testing.assert_allclose(posterior_mean("correlated_uniform", wins, pulled), [4 / 6, 2 / 6])
    np.testing.assert_allclose(posterior_mean("independent", wins, pulled), [3 / 5, 1 / 3])


def test_a_bandit_of_dependent_arms_has_two():
    with pytest.raises(ValueError, match="requires 2 arms, not 5"):
        Bandit.Config(prior="easy")
