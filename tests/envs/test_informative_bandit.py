import numpy as np
import pytest

from dmrl_ray.envs.informative_bandit import CANDIDATES, InformativeBandit, plan
from dmrl_ray.types import Task

EVERY = tuple(range(CANDIDATES))


def on_every_target(pulls=5):
    env = InformativeBandit(InformativeBandit.Config(pulls=pulls)).make_vec(CANDIDATES)
    env.tracks_belief = True
    env.set_tasks([Task("a", "b", "train", {"target": float(i)}) for i in range(CANDIDATES)])
    env.reset()
    return env


def test_arms_have_the_documented_rewards():
    env = on_every_target()
    np.testing.assert_allclose(env.step(np.full(10, 10))[1], np.arange(1, 11) / 10)
    np.testing.assert_allclose(env.step(np.full(10, 3))[1], np.where(np.arange(10) == 3, 5, 1))


def test_pulling_the_informative_arm_first_is_optimal():
    # 0.55 for the informative arm and 5 for each of the other four pulls; without it at most 11.0.
    assert plan(5, EVERY)[0] == pytest.approx(20.55)
    env = on_every_target()
    total = sum(env.step(env.expert_action())[1] for _ in range(5))
    assert total.mean() == pytest.approx(20.55)


def test_the_last_guesses_by_hand():
    # Two pulls left. With three candidates the value of a guess is (10 + 2 (1 + 3)) / 3 = 6, since
    # the last pull has 5 or 1 with equal probability; that of the informative arm is 5.55. With
    # five candidates the value of a guess is (10 + 4 (1 + 2)) / 5.
    explore = plan(5, EVERY)[1]
    assert not explore[2][3]
    assert explore[2][5]
    assert plan(1, EVERY)[0] == pytest.approx((5 + 9) / 10)
    assert not explore[1][10]


def test_the_belief_is_certain_when_one_candidate_remains():
    env = on_every_target(pulls=20)
    for arm in range(9):
        env.step(np.full(10, arm))
    np.testing.assert_allclose(env.belief()[:, :10], np.eye(10))
    np.testing.assert_array_equal(env.expert_action(), np.arange(10))


def test_random_pulls_have_the_random_return():
    family = InformativeBandit(InformativeBandit.Config())
    env, rng = family.make_vec(50_000), np.random.default_rng(0)
    env.set_tasks(family.sample(rng, 50_000, "test"))
    env.reset()
    total = sum(env.step(rng.integers(11, size=50_000))[1] for _ in range(5))
    error = total.std() / np.sqrt(50_000)
    assert total.mean() == pytest.approx(
        family.reference(Task("a", "b", "test", {})).random[0], abs=4 * error
    )
