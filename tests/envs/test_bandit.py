import numpy as np
import pytest

from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.envs.bandit_oracle import (
    KNOWN,
    bayes_optimal_return,
    exact_return,
    gittins_return,
    gittins_table,
    thompson_return,
    ucb1_return,
)
from dmrl_ray.types import Task


def task(chance):
    return Task("a", "bandit", "train", {"chance": np.array(chance)})


def by_enumeration(arms, pulls):
    """The optimum by trying every action after every history; nothing is merged or remembered."""
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
    # One pull left: the mean, 1/2. Two left at (0, 0): the charge x that a win, worth going on
    # with at 2/3, just pays for: 1/2 - x + (2/3 - x) / 2 = 0, so x = 5/9.
    table = gittins_table(2, levels=900)
    assert table[1, 0, 0] / 900 == pytest.approx(1 / 2, abs=1 / 800)
    assert table[2, 0, 0] / 900 == pytest.approx(5 / 9, abs=1 / 800)


def test_the_index_policy_earns_almost_the_optimum():
    assert gittins_return(2, 20) == pytest.approx(exact_return(2, 20), rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "tolerance"), [((5, 100), 0.2), ((10, 100), 0.2), ((50, 100), 0.2)]
)
def test_tabulated_gittins_returns_are_simulated_again(cell, tolerance):
    assert gittins_return(*cell, seed=1) == pytest.approx(KNOWN[cell], abs=tolerance)


@pytest.mark.slow
def test_the_tabulated_optimum_of_20_pulls_is_exact():
    assert KNOWN[5, 20] == pytest.approx(exact_return(5, 20), abs=1e-4)


def test_classic_baselines_earn_what_is_known():
    # Duan et al. 2016, table 1, gives 74.7 for Thompson sampling at (100, 5); 75.1 with 0.1 of
    # noise here. UCB1 with 0.2 earns 78.4.
    rng = np.random.default_rng(0)
    assert thompson_return(5, 100, 4000, rng) == pytest.approx(75.0, abs=0.6)
    assert ucb1_return(5, 100, 4000, rng) == pytest.approx(78.4, abs=0.6)


def test_an_unaffordable_oracle_is_left_unknown():
    assert bayes_optimal_return(3, 5000) is None
    assert Bandit(Bandit.Config(arms=3, pulls=5000)).reference(task([0, 0, 1])) is None


def test_rewards_come_with_the_chance_of_the_arm_pulled():
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
