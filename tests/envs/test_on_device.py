"""A family has the same episodes on a device as in NumPy."""

import numpy as np
import pytest
import torch

from dmrl_ray.envs.bandit import Bandit
from dmrl_ray.envs.grid_nav import GridNav
from dmrl_ray.envs.point_goal import PointGoal
from dmrl_ray.envs.registration import FAMILIES

CASES = {
    "bandit": (Bandit, {"pulls": 7}),
    "bandit_correlated": (Bandit, {"arms": 2, "pulls": 9, "prior": "correlated_uniform"}),
    "grid_nav": (GridNav, {}),
    "point_goal": (PointGoal, {"horizon": 7}),
    "point_goal_sparse": (PointGoal, {"horizon": 30, "goal": "semicircle", "sparse_radius": 0.9}),
}
NUM_ENVS = 50


class TensorsOf:
    """A NumPy generator that returns tensors."""

    def __init__(self, rng):
        self.rng = rng

    def random(self, size):
        return torch.from_numpy(self.rng.random(size))


@pytest.fixture(params=CASES)
def family(request):
    kind, settings = CASES[request.param]
    return kind(kind.Config.model_validate(settings))


def pair(family):
    """The family in NumPy and on a device, on the same tasks and with the same noise."""
    envs = family.make_vec(NUM_ENVS), family.make_vec(NUM_ENVS)
    envs[1].to_device(torch.device("cpu"), family.max_episode_steps)
    streams = np.random.default_rng(1), TensorsOf(np.random.default_rng(1))
    for env, stream in zip(envs, streams, strict=True):
        env.np_random = stream
        env.set_tasks(family.sample(np.random.default_rng(0), NUM_ENVS, "train"))
    return envs


def assert_same(tensors, arrays):
    for tensor, array in zip(tensors, arrays, strict=True):
        assert isinstance(tensor, torch.Tensor)
        # Square roots may differ in their last bit.
        np.testing.assert_allclose(tensor.numpy(), array, rtol=0, atol=5e-7, strict=True)


def play(family, env, other, num_steps, seed=0):
    """Steps both through ends of episodes and a change of tasks; returns the number of ends."""
    env.action_space.seed(seed)
    ends = 0
    for t in range(num_steps):
        if t == num_steps // 2:
            tasks = family.sample(np.random.default_rng(2), NUM_ENVS, "test")
            env.set_tasks(tasks)
            other.set_tasks(tasks)
        action = env.action_space.sample()
        (*mine, infos), (*theirs, other_infos) = (
            env.step(action),
            other.step(torch.from_numpy(action)),
        )
        assert_same(theirs, mine)
        assert other_infos.keys() == infos.keys()
        assert_same(other_infos.values(), infos.values())
        ends += "final_obs" in infos
    return ends


def test_every_step_is_the_same_as_in_numpy(family):
    env, other = pair(family)
    assert_same([other.reset()[0]], [env.reset()[0]])
    assert play(family, env, other, 3 * family.max_episode_steps) == 3


def test_open_episodes_continue_on_another_device(family):
    env, other = pair(family)
    env.reset()
    other.reset()
    play(family, env, other, family.max_episode_steps + 3)
    fresh = pair(family)[1]
    fresh.np_random, fresh_state = other.np_random, other.get_state()
    fresh.reset()
    fresh.set_state(fresh_state)
    env.np_random.bit_generator.state = other.np_random.rng.bit_generator.state
    assert play(family, env, fresh, 2 * family.max_episode_steps, seed=1) == 2


def test_a_state_is_a_copy(family):
    _, other = pair(family)
    other.reset()
    before = other.get_state()
    kept = {name: array.copy() for name, array in before.items()}
    other.action_space.seed(0)
    other.step(torch.from_numpy(other.action_space.sample()))
    for name, array in before.items():
        np.testing.assert_array_equal(array, kept[name])


def test_only_families_of_one_episode_length_can_be_on_a_device():
    able = {name for name, kind in FAMILIES.items() if kind.on_device}
    assert able == {"Bandit", "GridNav", "PointGoal"}
    assert all(FAMILIES[name].fixed_length for name in able)
