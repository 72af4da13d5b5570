"""Environments whose observations have parts: dictionaries, tuples, several integers."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.envs.gym_env import GymEnv
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.types import EnvironmentFault


class Signs(gym.Env):
    """The rewarded action is the bright side of the picture; with the word 4, the other side."""

    observation_space = Dict(
        see=Dict(picture=Box(0, 255, (4, 4, 1), np.uint8), wind=Box(-1.0, 1.0, (2,), np.float64)),
        words=MultiDiscrete([6, 6], start=[3, 3]),
        step=Discrete(9, start=1),
    )
    action_space = Discrete(2)
    wrong = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        reward = float(action == self.answer)
        self.t += 1
        return self.observe(), reward, False, self.t >= 8, {}

    def observe(self):
        side, word = self.np_random.integers(2, size=2)
        self.answer = side ^ word
        picture = np.zeros((4, 4, 1), np.uint8)
        picture[:, 3 * side] = 255
        wind = self.np_random.uniform(-1, 1, 2)
        words = np.array([3 + word, self.np_random.integers(3, 9)])
        obs = {"see": {"picture": picture, "wind": wind}, "words": words, "step": self.t + 1}
        if self.wrong and self.t == 5:
            obs.update(self.wrong)
        return obs


class Constant(gym.Env):
    """Always returns the given observation."""

    action_space = Discrete(2)

    def __init__(self, space, obs):
        self.observation_space, self.obs = space, obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs, {}

    def step(self, action):
        return self.obs, 0.0, False, False, {}


gym.register("Signs-v0", entry_point=Signs, max_episode_steps=8)
gym.register("Constant-v0", entry_point=Constant, max_episode_steps=8)


def first_obs(space, obs):
    family = GymEnv(
        GymEnv.Config.model_validate({"id": "Constant-v0", "kwargs": {"space": space, "obs": obs}})
    )
    env = family.make_vec(1)
    env.np_random = np.random.default_rng(0)
    env.set_tasks(family.sample(np.random.default_rng(0), 1, "train"))
    return family.observation_space, env.reset()[0][0].tolist()


def test_parts_have_dotted_names():
    space = GymEnv(GymEnv.Config(id="Signs-v0")).observation_space
    assert list(space.parts) == ["see.picture", "see.wind", "words", "step"]
    assert space.shape == (16 + 2 + 9 + 2,)


def test_a_tuple_is_its_members_in_order():
    space, obs = first_obs(Tuple((Box(0, 9, (1,)), Discrete(3))), (np.array([7.0]), 1))
    assert list(space.parts) == ["0", "1"]
    assert obs == [7.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("space", "value"), [(MultiDiscrete([5, 5]), [4, 2]), (MultiBinary(2), [1, 0])]
)
def test_several_integers_are_one_part(space, value):
    packed, obs = first_obs(space, np.array(value, np.int8))
    assert list(packed.parts) == ["obs"]
    assert obs == value


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": np.array([3, 9])}, r"observation\['words'\] is array\(\[3, 9\]\), not in"),
        ({"see": {"picture": 0}}, "observation does not match .*KeyError: 'wind'"),
        ({"step": 1.5}, r"observation\['step'\] is 1.5, not in Discrete"),
    ],
)
def test_a_part_outside_its_space_is_named(wrong, message, monkeypatch):
    family = GymEnv(GymEnv.Config(id="Signs-v0"))
    env = family.make_vec(1)
    env.np_random = np.random.default_rng(0)
    env.set_tasks(family.sample(np.random.default_rng(0), 1, "train"))
    env.reset()
    monkeypatch.setattr(Signs, "wrong", wrong)
    for _ in range(4):
        env.step(np.array([0]))
    with pytest.raises(EnvironmentFault, match=f"environment 0, episode seed .*step 5: {message}"):
        env.step(np.array([0]))


def learner_of(encoder):
    parts = (
        {"type": "gym", "id": "Signs-v0"},
        {"type": "actor_critic", "encoder": encoder},
        {"type": "ppo", "num_steps": 16, "lr": 3e-3, "gamma": 0.0},
    )
    parts = (Component.model_validate(part) for part in parts)
    return Learner(JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=32)))


def train(learner, iterations):
    """Mean reward of each iteration."""
    worker, state, rewards = RolloutWorker(), {}, []
    for i in range(iterations):
        weights = Weights(i, learner.weights())
        _, trial, state = worker.collect(CollectCall(learner.spec, 0, i, 0), weights, state)
        learner.update(i, 0, [trial])
        rewards.append(trial[0].reward.mean())
    return rewards


SMALL = {"see.picture": {"type": "cnn", "channels": [4], "hidden_sizes": [16]}}
MLP = {"type": "mlp", "hidden_sizes": [32]}
GRU = {"type": "gru", "hidden_size": 32}


@pytest.mark.parametrize(
    "encoder",
    [
        {"type": "combined"},
        {"type": "combined", "parts": SMALL, "trunk": GRU},
        {"type": "gru", "hidden_size": 16, "torso": {"type": "combined", "parts": SMALL}},
    ],
    ids=["defaults", "memory_in_trunk", "memory_around"],
)
def test_a_policy_steps_and_learns_from_all_parts(encoder):
    learner = learner_of(encoder)
    before = {n: p.detach().clone() for n, p in learner.policy.named_parameters()}
    train(learner, 1)
    still = [n for n, p in learner.policy.named_parameters() if torch.equal(p, before[n])]
    assert not still


@pytest.mark.slow
def test_a_policy_learns_from_picture_and_words_together():
    rewards = train(learner_of({"type": "combined", "parts": SMALL, "trunk": MLP}), 60)
    assert np.mean(rewards[:3]) < 0.6
    assert np.mean(rewards[-5:]) > 0.9
