import gymnasium as gym
import numpy as np
import pytest

from dmrl_ray.envs.cartpole import RANDOM_RETURN, STANDARD, CartPole
from dmrl_ray.types import Task


def task(**physics):
    return Task("a", "cartpole", "train", {**STANDARD, **physics})


def push(obs, noise, rng):
    """Balances the pole, or takes a random action with probability `noise`."""
    if rng.random() < noise:
        return int(rng.integers(2))
    return int(obs[2] + 0.3 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1] > 0)


def compare(env, reference, num_steps):
    """Steps both with the same actions, asserts equality, and returns how their episodes ended.

    Every second episode has random actions and ends soon.
    """
    rng, ends = np.random.default_rng(0), []
    obs, expected = env.reset(seed=5)[0], reference.reset(seed=5)[0]
    for _ in range(num_steps):
        np.testing.assert_array_equal(obs[0], expected)
        action = push(expected, 1.0 if len(ends) % 2 else 0.03, rng)
        obs, *rest, infos = env.step(np.array([action]))
        expected, *expected_rest, _ = reference.step(action)
        assert [float(part[0]) for part in rest] == [float(part) for part in expected_rest]
        if any(expected_rest[1:]):
            ends.append(tuple(expected_rest[1:]))
            np.testing.assert_array_equal(infos["final_obs"][0], expected)
            expected = reference.reset()[0]
    return ends


def test_the_standard_physics_are_cartpole_v1_to_the_last_bit():
    env = CartPole(CartPole.Config()).make_vec(1)
    ends = compare(env, gym.make("CartPole-v1"), 8000)
    assert {(True, False), (False, True)} <= set(ends)  # it fell and it ran out of time


def test_other_physics_are_those_of_an_edited_cartpole():
    physics = {"gravity": 14.0, "length": 0.8, "masspole": 0.3, "force_mag": 7.0}
    reference = gym.make("CartPole-v1")
    for name, value in physics.items():
        setattr(reference.unwrapped, name, value)
    reference.unwrapped.total_mass = 0.3 + 1.0
    reference.unwrapped.polemass_length = 0.3 * 0.8
    env = CartPole(CartPole.Config()).make_vec(1)
    env.set_tasks([task(**physics)])
    assert compare(env, reference, 2000)


def test_environments_are_independent_of_each_others_physics():
    alone, together = (CartPole(CartPole.Config()).make_vec(n) for n in (1, 3))
    alone.set_tasks([task(gravity=5.0)])
    together.set_tasks([task(), task(gravity=5.0), task(length=1.0)])
    for env in (alone, together):
        env.reset(seed=0)
    alone.motion = together.motion[1:2]
    for action in [1, 0, 1, 1, 0]:
        one = alone.step(np.array([action]))[0][0]
        np.testing.assert_array_equal(one, together.step(np.array([0, action, 1]))[0][1])


def test_random_return_is_that_of_random_play():
    env, rng = CartPole(CartPole.Config()).make_vec(20_000), np.random.default_rng(1)
    env.reset(seed=0)
    alive, length = np.ones(20_000, bool), np.zeros(20_000)
    while alive.any():
        length += alive
        terminated, truncated = env.step(rng.integers(2, size=20_000))[2:4]
        alive &= ~(terminated | truncated)
    assert length.mean() == pytest.approx(RANDOM_RETURN, abs=4 * length.std() / np.sqrt(20_000))


def test_only_the_standard_physics_have_a_reference():
    family = CartPole(CartPole.Config(gravity=(5.0, 15.0)))
    assert family.reference(task()).oracle == 500
    assert family.reference(task(gravity=9.0)) is None


def test_a_reversed_range_is_refused():
    with pytest.raises(ValueError, match="in order"):
        CartPole.Config(gravity=(15.0, 5.0))
