"""Runs in environments that others wrote and that do what environments should not."""

import json
import re
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from typer.testing import CliRunner

from dmrl_ray import __main__ as cli
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.envs.cartpole import CartPole, CartPoleVectorEnv
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.tasks.distribution import make_tasks
from dmrl_ray.types import EnvironmentFault

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
            "clock": time.perf_counter() % 1,
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


class Fragile(gym.Env):
    """Breaks when the sum of its actions and noise passes a limit."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    limit = 14.0

    def __init__(self):
        self.wind = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.x += action + self.wind * self.np_random.random()
        if self.x > self.limit:
            raise OSError(f"the simulator is gone at {self.x:.6f}")
        return np.array([self.x], np.float32), 0.0, False, False, {}


gym.register("Fragile-v0", Fragile, max_episode_steps=20)
FRAGILE = "tasks={type: gym, id: Fragile-v0, vary: {wind: [0.5, 1.5]}}"


def fragile_run(folder, *settings, fails=True):
    changes = [FRAGILE, "stages.train.env_steps=960", *settings]
    if fails:
        with pytest.raises(EnvironmentFault) as caught:
            run(folder, *changes)
        return str(caught.value)
    return run(folder, *changes)


@pytest.mark.parametrize("on_error", ["restart_episode", "quarantine_task"])
def test_an_environment_that_fails_now_and_then_does_not_end_a_run(on_error, tmp_path):
    # With an average of half a step an action, and of wind, some episodes of 20 steps pass 14.
    change = f"environments={{on_error: {on_error}, max: 1000}}"
    out = fragile_run(tmp_path / "out", change, "seed=3", fails=False)
    faults = [json.loads(detail) for detail in events(out, "environment_fault")]
    assert [fault["number"] for fault in faults] == [*range(1, len(faults) + 1)]
    assert len(faults) > 2
    cut = sorted(length for length in load(out)["length"] if length < 20)
    assert cut == sorted(fault["step"] for fault in faults if fault["step"] < 20)
    again = fragile_run(tmp_path / "again", change, "seed=3", fails=False)
    assert load(again)["return"].tolist() == load(out)["return"].tolist()
    assert "it did not show again" not in call_reproduce(out, 1)


def call_reproduce(out, number):
    answer = CliRunner().invoke(cli.app, ["reproduce", str(out), str(number)])
    assert answer.exit_code == 5
    return answer.stdout


def test_a_task_in_quarantine_is_not_drawn_any_more(tmp_path):
    change = "tasks={type: gym, id: Fragile-v0, vary: {wind: {choices: [0.0, 9.0]}}}"
    settings = ["environments={on_error: quarantine_task, max: 50}", "stages.train.env_steps=960"]
    out = run(tmp_path / "out", change, *settings, "stages.train.validation_tasks=1")
    frame = load(out).merge(load(out, table="tasks"), on=["run_id", "task_id", "split"])
    late = frame[(frame["split"] == "train") & (frame["env_steps"] > 100)]
    assert set(late["param.wind"]) == {0.0}
    assert 9.0 in set(frame["param.wind"])


def test_more_faults_than_may_be_end_the_run(tmp_path):
    change = "environments={on_error: restart_episode, max: 2}"
    message = fragile_run(tmp_path / "out", change)
    assert message.startswith("environments.max: 3 faults of environments in this run, the last")


def test_a_run_that_a_fault_ended_can_be_told_to_restart_episodes(tmp_path):
    out = tmp_path / "out"
    fragile_run(out)
    changes = ["environments={on_error: restart_episode, max: 1000}"]
    controller.resume(out, overrides=changes, display=Display(quiet=True))
    assert events(out, "run_finished")


def test_environments_that_step_together_cannot_be_restarted_one_by_one(call):
    answer = call(
        "config", "config.yaml", "tasks=cartpole", "environments.on_error=restart_episode"
    )
    assert answer.exit_code == 2
    assert "environments.on_error: task family 'cartpole' steps its environments" in answer.stderr


class BreakingEnv(CartPoleVectorEnv):
    def step(self, actions):
        answer = super().step(actions)
        if (speed := np.abs(answer[0]).max()) > 2.5:
            raise ZeroDivisionError(f"no mass at {speed:.9f}")
        return answer


class Breaking(CartPole):
    def make_vec(self, num_envs):
        env = super().make_vec(num_envs)
        env.__class__ = BreakingEnv
        return env


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Calls the command line in an empty folder with the config."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def test_a_fault_names_its_episode_and_a_command_plays_it_alone(call, monkeypatch):
    answer = call("run", "config.yaml", FRAGILE, "--out", "out")
    assert answer.exit_code == 5
    error, command = answer.stderr.splitlines()[-2:]
    found = re.fullmatch(
        r"error: Fragile-v0: environment [01], episode seed \d+, step \d+: step raised OSError: "
        r"(the simulator is gone at [\d.]+) after action [01], on task ([0-9a-f]{16}) "
        r"\{'wind': ([\d.]+)\}",
        error,
    )
    assert found, error
    assert command == "play it again with: python -m dmrl_ray reproduce out 1"
    (task,) = make_tasks("gym:Fragile-v0", "train", {"wind": np.array([float(found[3])])})
    assert task.id == found[2]
    again = call(*command.split()[7:])
    assert again.exit_code == 5
    assert found[1] in again.stderr.splitlines()[-1]
    assert "raise OSError(" in again.stderr
    monkeypatch.setattr(Fragile, "limit", np.inf)
    assert "it did not show again" in call("reproduce", "out").stdout


def test_a_fault_where_environments_step_together_is_met_again_from_the_newest_commit(call):
    text = CONFIG.replace("{type: gym, id: Unsteady-v0}", f"{__name__}:Breaking")
    Path("config.yaml").write_text(text.replace("env_steps: 48", "env_steps: 4800"))
    answer = call("run", "config.yaml", "commit.every_updates=2", "--out", "out")
    assert answer.exit_code == 5, answer.output
    (found,) = re.findall(r"no mass at [\d.]+", answer.stderr.splitlines()[-2])
    assert len(list(Path("out/commits").iterdir())) > 2
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    again = call("reproduce", "out", "1")
    assert again.exit_code == 5
    assert found in again.stderr.splitlines()[-1]
    after = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert before == after


def test_a_fault_that_a_run_does_not_have_is_refused(call):
    call("run", "config.yaml", FRAGILE, "--out", "out")
    assert "there is no fault 2; there are 1 to 1" in call("reproduce", "out", "2").stderr
    call("run", "config.yaml", "--out", "fine")
    answer = call("reproduce", "fine")
    assert answer.exit_code == 2
    assert "no environment of this run has failed" in answer.stderr
