import numpy as np
import pytest

from dmrl_ray.envs.point_goal import (
    MAX_REFERENCE_HORIZON,
    PointGoal,
    known_goal_return,
    random_return,
)
from dmrl_ray.types import Task


def env_at(goal_position, num_envs=1, tracks_belief=False, **settings):
    env = PointGoal(PointGoal.Config(**settings)).make_vec(num_envs)
    env.tracks_belief = tracks_belief
    env.set_tasks([Task("a", "point_goal", "train", {"goal": np.array(goal_position)})] * num_envs)
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


def test_a_straight_walk_has_the_oracle_return():
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


def test_actions_beyond_the_limits_are_clipped():
    env = env_at([0.5, 0.5])
    obs, reward, *_ = env.step(np.array([[7.0, -3.0]]))
    np.testing.assert_allclose(obs[0], [0.1, -0.1], atol=1e-7)
    assert reward[0] == pytest.approx(-np.hypot(0.4, 0.6))


def test_the_end_is_a_time_limit():
    env = env_at([0.5, 0.5], horizon=2)
    ends = [env.step(np.zeros((1, 2)))[2:4] for _ in range(2)]
    assert [(bool(a[0]), bool(b[0])) for a, b in ends] == [(False, False), (False, True)]


@pytest.mark.parametrize(("horizon", "mean"), [(20, 13.38), (60, 53.38), (100, 93.38)])
def test_mean_oracle_of_the_sparse_half_circle_is_the_known_one(horizon, mean):
    # The goal is reached in 7 to 10 moves, whatever the horizon; the rewards are 1 from then on.
    angle = np.pi * (np.arange(4000) + 0.5) / 4000
    goals = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    returns = [known_goal_return(goal, horizon, 0.2) for goal in goals]
    assert np.mean(returns) == pytest.approx(mean, abs=5e-3)


def test_a_sparse_reward_is_positive_within_the_radius_alone():
    env = env_at([0.0, 1.0], goal="semicircle", sparse_radius=0.2)
    reward = [env.step(np.array([[0.0, 0.98]]))[1][0] for _ in range(10)]
    np.testing.assert_allclose(reward[:8], 0)
    np.testing.assert_allclose(reward[8:], [1 - 0.118, 1 - 0.02], atol=1e-6)


def test_a_goal_out_of_reach_has_no_reference():
    task = Task("a", "point_goal", "train", {"goal": np.array([0.0, 1.0])})
    near, far = (
        PointGoal(PointGoal.Config(goal="semicircle", sparse_radius=0.25, horizon=horizon))
        for horizon in (8, 7)
    )
    assert near.reference(task).oracle[0] == pytest.approx(0.8)
    assert far.reference(task) is None


def test_random_return_of_a_sparse_goal_is_that_of_random_play():
    angle = 0.7
    goal, rng = np.array([np.cos(angle), np.sin(angle)]), np.random.default_rng(1)
    env = env_at(goal, num_envs=4000, horizon=60, goal="semicircle", sparse_radius=0.5)
    total = sum(env.step(rng.uniform(-1, 1, (4000, 2)))[1].astype(float) for _ in range(60))
    error = total.std() / np.sqrt(4000)
    assert total.mean() == pytest.approx(random_return(goal, 60, 0.5), abs=4 * error)


def test_goals_of_the_half_circle_are_uniform_in_angle():
    family = PointGoal(PointGoal.Config(goal="semicircle"))
    goal = np.array(
        [t.params["goal"] for t in family.sample(np.random.default_rng(0), 4000, "test")]
    )
    np.testing.assert_allclose(np.linalg.norm(goal, axis=1), 1)
    angle = np.arctan2(goal[:, 1], goal[:, 0])
    np.testing.assert_allclose(
        np.quantile(angle, [0.25, 0.5, 0.75]) / np.pi, [0.25, 0.5, 0.75], atol=0.04
    )


def test_a_sparse_belief_excludes_unrewarded_angles_and_finds_the_goal():
    angle = 2.0
    goal = np.array([np.cos(angle), np.sin(angle)])
    env = env_at(goal, tracks_belief=True, goal="semicircle", sparse_radius=0.2)
    for _ in range(10):  # to (1, 0), where the goals within 0.2 are those up to 0.2003 radians
        env.step(np.array([[1.0, 0.0]]))
    excluded = env.belief()[0] < 1e-6
    assert excluded.sum() == pytest.approx(0.2003 / np.pi * 64, abs=1)
    assert excluded[:4].all()
    env.reset()
    for t in range(1, 16):
        env.step(10 * (goal - env.position) if t < 10 else np.array([[0.3, 0.1]]))
    assert env.belief()[0].argmax() == int(angle / np.pi * 64)
    assert env.belief()[0].max() > 0.3


def test_a_dense_belief_finds_the_angle_from_any_walk():
    angle = 0.9
    env = env_at([np.cos(angle), np.sin(angle)], tracks_belief=True, goal="semicircle")
    rng = np.random.default_rng(0)
    for _ in range(60):
        env.step(rng.uniform(-1, 1, (1, 2)))
    assert env.belief()[0] @ (np.pi * (np.arange(64) + 0.5) / 64) == pytest.approx(angle, abs=0.05)


def test_goals_in_a_square_have_no_belief():
    with pytest.raises(NotImplementedError, match="half circle"):
        env_at([0.1, 0.2]).belief()


def test_an_episode_too_long_for_the_table_of_returns_has_no_reference():
    family = PointGoal(PointGoal.Config(horizon=MAX_REFERENCE_HORIZON + 1))
    assert family.reference(family.sample(np.random.default_rng(0), 1, "train")[0]) is None
