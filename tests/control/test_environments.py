"""Runs in environments that others wrote and that do what environments should not."""

import time

import gymnasium as gym
import numpy as np
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

CONFIG = """
tasks: {type: gym, id: Unsteady-v0}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 8, epochs: 1, minibatches: 1}
rollout: {shards: 1, num_envs: 2}
workers: {num: 0}
learners: {threads: 1}
stages:
  train: {type: pretrain, env_steps: 48, validation_tasks: 2, validate_every: 100}
"""


class Unsteady(gym.Env):
    """Observes a number that its seed does not determine, if it is `broken` so."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, broken=""):
        self.broken, self.steps = broken, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.obs(), {}

    def obs(self):
        unsteady = {
            "": self.np_random.normal(),
            "global": np.random.normal(),  # noqa: NPY002
            "clock": time.perf_counter(),
            "kept": self.steps,
        }
        return np.array([unsteady[self.broken]], np.float32)

    def step(self, action):
        self.steps += 1
        return self.obs(), 0.0, False, False, {}


gym.register("Unsteady-v0", Unsteady, max_episode_steps=20)


def run(folder, *settings):
    config = parse_config(CONFIG, "config.yaml", list(settings))
    return controller.run(config, folder, display=Display(quiet=True))


def events(folder, name):
    table = load(folder, table="events")
    return table.loc[table["event"] == name, "detail"].tolist()


@pytest.mark.parametrize("broken", ["", "global", "clock", "kept"])
def test_an_environment_that_does_not_repeat_itself_is_told_and_its_run_can_be_resumed(
    broken, tmp_path
):
    # 24 steps of each environment, so that the episodes of 20 steps are open at the end.
    out = run(tmp_path / "out", f"tasks.kwargs={{broken: '{broken}'}}")
    warnings = events(out, "not_repeatable")
    assert len(warnings) == (broken != "")
    assert not broken or "two plays of one seed and the same actions differ" in warnings[0]
    controller.resume(out, overrides=["stages.train.env_steps=96"], display=Display(quiet=True))
    again = events(out, "episodes_begun_again")
    assert len(again) == (broken != "")
    assert not broken or "led to another observation" in again[0]
    assert events(out, "run_finished")
