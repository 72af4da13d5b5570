import numpy as np
import pytest

from dmrl_ray.envs.informative_bandit import CANDIDATES, InformativeBandit, plan
from dmrl_ray.types import Task

EVERY = tuple(range(CANDIDATES))


def on_every_target(pulls=5):
    env = InformativeBandit(InformativeBandit.Config(pulls=pulls)).make_vec(CANDIDATES)
    env.remembers = True
    env.set_tasks([Task("a", "b", "train", {"target": float(i)}) for i in range(CANDIDATES)])
    env.reset()
    return env


def test_arms_pay_what_they_are_said_to():
    env = on_every_target()
    np.testing.assert_allclose(env.step(np.full(10, 10))[1], np.arange(1, 11) / 10)
    np.testing.assert_allclose(env.step(np.full(10, 3))[1], np.where(np.arange(10) == 3, 5, 1))


def test_asking_first_is_worth_the_known_optimum():
    # 0.55 for the informative arm and 5 for each of the other four pulls; searching earns 11.0.
    assert plan(5, EVERY)[0] == pytest.approx(20.55)
    env = on_every_target()
    total = sum(env.step(env.expert_action())[1] for _ in range(5))
    assert total.mean() == pytest.approx(20.55)


def test_the_last_guesses_by_hand():
    # Two pulls left. Of three candidates a guess is worth (10 + 2 (1 + 3)) / 3 = 6, since the last
    # of two is a coin toss of 5 and 1; asking is worth 5.55. Of five it is (10 + 4 (1 + 2)) / 5.
    asks = plan(5, EVERY)[1]
    assert not asks[2][3]
    assert asks[2][5]
    assert plan(1, EVERY)[0] == pytest.approx((5 + 9) / 10)
    assert not asks[1][10]


def test_whoever_has_excluded_all_but_one_knows_the_target():
    env = on_every_target(pulls=20)
    for arm in range(9):
        env.step(np.full(10, arm))
    np.testing.assert_allclose(env.belief()[:, :10], np.eye(10))
    np.testing.assert_array_equal(env.expert_action(), np.arange(10))


def test_random_pulls_earn_the_random_end():
    family = InformativeBandit(InformativeBandit.Config())
    env, rng = family.make_vec(50_000), np.random.default_rng(0)
    env.set_tasks(family.sample(rng, 50_000, "test"))
    env.reset()
    total = sum(env.step(rng.integers(11, size=50_000))[1] for _ in range(5))
    error = total.std() / np.sqrt(50_000)
    assert total.mean() == pytest.approx(
        family.reference(Task("a", "b", "test", {})).random[0], abs=4 * error
    )
