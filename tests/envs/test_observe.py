"""Additional observations are correct at every step and do not change the family."""

import numpy as np
import pytest

from dmrl_ray.config.schema import Component
from dmrl_ray.envs.observe import Observe, task_vector
from dmrl_ray.types import Task

GOALS = {"type": "point_goal", "horizon": 3}
GRID = {"type": "grid_nav"}


def observing(of, *show):
    return Observe(Observe.Config.model_validate({"of": of, "show": show or ("task",)}))


def stream(seed=0):
    return np.random.default_rng(seed)


def started(family, tasks):
    env = family.make_vec(len(tasks))
    env.np_random = stream()
    env.set_tasks(tasks)
    return env, env.reset()[0]


def test_a_task_is_its_parameters_in_order_of_their_names():
    params = {"mass": 3.0, "goal": np.array([[1.0, 2.0]])}
    vector = task_vector(Task("t", "f", "train", params))
    np.testing.assert_array_equal(vector, np.float32([1, 2, 3]))


def test_an_observation_is_the_familys_own_and_the_task():
    family = observing(GOALS)
    tasks = family.sample(stream(), 4, "train")
    env, first = started(family, tasks)
    own = family.inner.make_vec(4)
    own.np_random = stream()
    own.set_tasks(tasks)
    own.reset()
    goals = np.float32([task.params["goal"] for task in tasks])
    np.testing.assert_array_equal(first, np.concatenate([np.zeros((4, 2)), goals], 1))
    for seed in range(7):  # over the ends of episodes
        action = stream(seed).uniform(-1, 1, (4, 2)).astype(np.float32)
        for one, other in zip(env.step(action)[:4], own.step(action)[:4], strict=True):
            if one.ndim == 2:
                np.testing.assert_array_equal(one[:, 2:], goals)
                one = one[:, :2]
            np.testing.assert_array_equal(one, other)


def test_a_new_task_is_observed_from_its_first_observation_on_and_not_before():
    # Both episodes end after 3 steps; the new goals are set after the first.
    family = observing(GOALS)
    before, after = family.sample(stream(), 2, "train"), family.sample(stream(1), 2, "train")
    old, new = (np.float32([task.params["goal"] for task in tasks]) for tasks in (before, after))
    env, _ = started(family, before)
    action = np.zeros((2, 2), np.float32)
    env.step(action)
    env.set_tasks(after)
    np.testing.assert_array_equal(env.step(action)[0][:, 2:], old)
    obs, reward, _, truncated, infos = env.step(action)
    assert truncated.all()
    np.testing.assert_array_equal(infos["final_obs"][:, 2:], old)
    np.testing.assert_allclose(reward, -np.linalg.norm(old, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(obs[:, 2:], new)


def test_only_environments_whose_episode_ended_observe_their_new_task():
    family = observing({"type": "cartpole", "gravity": [5, 15]})
    env, obs = started(family, family.sample(stream(), 8, "train"))
    env.set_tasks(family.sample(stream(1), 8, "train"))
    before, ended = obs[:, 4:].copy(), np.zeros(8, bool)
    for _ in range(15):  # always to one side: poles fall at different steps
        obs, _, terminated, truncated, _ = env.step(np.ones(8, np.int64))
        ended |= terminated | truncated
        changed = (obs[:, 4:] != before).any(1)
        np.testing.assert_array_equal(changed, ended)
        if 0 < ended.sum() < 8:
            return
    pytest.fail("all poles fell at once")


def test_the_observed_belief_is_the_environments():
    family = observing(GRID, "belief")
    env, obs = started(family, family.sample(stream(), 3, "train"))
    part = family.observation_space.slices["belief"]
    first = obs[:, part].copy()
    np.testing.assert_array_equal(first, env.belief())
    for seed in range(40):  # beyond the end of an episode
        obs = env.step(stream(seed).integers(0, 5, 3))[0]
        np.testing.assert_array_equal(obs[:, part], env.belief())
    assert not np.array_equal(obs[:, part], first)


def test_the_belief_of_the_next_task_starts_from_the_prior():
    family = observing(GRID, "belief")
    env, obs = started(family, family.sample(stream(), 3, "train"))
    first = obs[:, family.observation_space.slices["belief"]].copy()
    for seed in range(14):  # one less than an episode
        env.step(stream(seed).integers(0, 5, 3))
    env.set_tasks(family.sample(stream(1), 3, "train"))
    assert not np.array_equal(env.belief(), first)
    np.testing.assert_array_equal(env.reset()[0][:, -first.shape[1] :], first)


def test_an_observed_belief_is_always_tracked():
    family = observing(GRID, "belief")
    env = family.make_vec(2)
    env.tracks_belief = False
    assert env.tracks_belief
    without = observing(GRID).make_vec(2)
    assert not without.tracks_belief
    without.tracks_belief = True
    assert without.env.tracks_belief


def test_names_lengths_and_references_are_the_familys():
    family = observing(GRID, "task", "belief")
    inner = family.inner
    assert list(family.observation_space.parts) == ["obs", "task", "belief"]
    assert (family.family, family.trial_steps) == (inner.family, inner.trial_steps)
    (task,) = family.sample(stream(), 1, "test")
    assert task == inner.sample(stream(), 1, "test")[0]
    np.testing.assert_array_equal(family.reference(task).oracle, inner.reference(task).oracle)


def test_a_family_without_a_belief_is_refused():
    with pytest.raises(
        ValueError, match=r"point_goal.*no belief .*half circle.*; use task instead"
    ):
        observing(GOALS, "belief")


def test_a_family_is_given_like_any_other_component():
    settings = Component.model_validate({"type": "observe", "of": "point_goal"}).settings
    assert Observe(settings).family == "point_goal"
