import numpy as np
import pytest

from dmrl_ray.envs.point_goal import PointGoal, known_goal_return, random_return
from dmrl_ray.types import Task


def env_at(goal, num_envs=1, horizon=100):
    env = PointGoal(PointGoal.Config(horizon=horizon)).make_vec(num_envs)
    env.set_tasks([Task("a", "point_goal", "train", {"goal": np.array(goal)})] * num_envs)
    env.reset()
    return env


def test_known_goal_return_by_hand():
    # Goal (0.3, -0.15): distances after each move (0.2, 0.05), (0.1, 0), (0, 0).
    expected = -(np.hypot(0.2, 0.05) + 0.1)
    assert known_goal_return(np.array([0.3, -0.15]), 100) == pytest.approx(expected)
    assert known_goal_return(np.array([0.3, -0.15]), 1) == pytest.approx(-np.hypot(0.2, 0.05))


def test_no_plan_beats_the_known_goal_return():
    # Every plan of three moves on a grid of 9 actions per axis that contains the best one.
    goal, levels = np.array([0.3, -0.2]), np.linspace(-0.1, 0.1, 9)
    moves = np.stack(np.meshgrid(levels, levels), axis=-1).reshape(-1, 2)
    one = np.linalg.norm(moves - goal, axis=-1)
    two_at = moves[:, None] + moves
    two = one[:, None] + np.linalg.norm(two_at - goal, axis=-1)
    three_at = (two_at[:, :, None] + moves).reshape(len(moves), len(moves), -1, 2)
    three = two[..., None] + np.linalg.norm(three_at - goal, axis=-1)
    assert -three.min() == pytest.approx(known_goal_return(goal, 3), abs=1e-9)


def test_mean_oracle_over_goals_is_the_integral():
    # After t moves an axis is r = 0.5 - 0.1 t off at most: with probability q = r / 0.5 uniformly
    # on [0, r], else not at all. The mean distance to a corner of a unit square is
    # c = (sqrt 2 + ln(1 + sqrt 2)) / 3; the cost is the sum of q^2 c r + 2 q (1 - q) r / 2.
    r = np.array([0.4, 0.3, 0.2, 0.1])
    q, c = r / 0.5, (np.sqrt(2) + np.log(1 + np.sqrt(2))) / 3
    expected = -(q**2 * c * r + q * (1 - q) * r).sum()
    axis = (np.arange(60) + 0.5) / 60 - 0.5
    returns = [known_goal_return(np.array([x, y]), 100) for x in axis for y in axis]
    assert np.mean(returns) == pytest.approx(expected, abs=5e-4)
    assert expected == pytest.approx(-0.506, abs=5e-4)


def test_the_environment_pays_the_oracle_to_a_straight_walk():
    goal = np.array([0.37, -0.42])
    env, position, total = env_at(goal), np.zeros(2), 0.0
    for _ in range(100):
        obs, reward, *_ = env.step(10 * (goal - position)[None])
        position, total = obs[0], total + reward[0]
    assert total == pytest.approx(known_goal_return(goal, 100), abs=1e-4)


@pytest.mark.parametrize("goal", [(0.0, 0.0), (0.5, -0.5), (0.33, 0.21)])
def test_random_return_is_that_of_random_play(goal):
    env, rng = env_at(goal, num_envs=4000), np.random.default_rng(1)
    total = sum(env.step(rng.uniform(-1, 1, (4000, 2)))[1].astype(float) for _ in range(100))
    error = total.std() / np.sqrt(4000)
    assert total.mean() == pytest.approx(random_return(np.array(goal), 100), abs=4 * error)


def test_random_return_of_one_step_is_the_integral():
    # The mean distance from a point of the square [-0.1, 0.1]^2, by quadrature.
    axis = 0.1 * (2 * (np.arange(400) + 0.5) / 400 - 1)
    goal = np.array([0.2, 0.05])
    expected = -np.hypot(axis[:, None] - goal[0], axis - goal[1]).mean()
    assert random_return(goal, 1) == pytest.approx(expected, abs=1e-4)


def test_actions_beyond_the_limits_are_cut():
    env = env_at([0.5, 0.5])
    obs, reward, *_ = env.step(np.array([[7.0, -3.0]]))
    np.testing.assert_allclose(obs[0], [0.1, -0.1], atol=1e-7)
    assert reward[0] == pytest.approx(-np.hypot(0.4, 0.6))


def test_the_end_is_a_time_limit():
    env = env_at([0.5, 0.5], horizon=2)
    ends = [env.step(np.zeros((1, 2)))[2:4] for _ in range(2)]
    assert [(bool(a[0]), bool(b[0])) for a, b in ends] == [(False, False), (False, True)]
