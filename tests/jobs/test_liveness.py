"""Busy is told from hung from outside the process, and an environment that takes long is named."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.jobs.liveness import Watch, own_environments, told
from dmrl_ray.results.display import Display
from dmrl_ray.tasks.activity import COMPUTING, RESET, during, mine
from dmrl_ray.types import EnvironmentFault

ROOT = Path(__file__).resolve().parents[2]

PROCESS = """
import subprocess, sys, time
from dmrl_ray.tasks.activity import COMPUTING, IDLE, RESET, WAITING, during
with during({what}):
    print("x", flush=True)
    {within}
"""

SLEEP, LOOP = "time.sleep(60)", "while True: pass"
CHILD = "subprocess.run([sys.executable, '-c', 'while True: pass'], timeout=60)"


@contextmanager
def process(what, within):
    code = PROCESS.format(what=what, within=within)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, process_group=0) as p:
        try:
            p.stdout.readline()
            yield p.pid
        finally:
            os.killpg(p.pid, signal.SIGKILL)


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self):
        return self.now


def looks(watch, clock, pid, seconds):
    """The last of looks once a second."""
    for _ in range(seconds):
        clock.now += 1.0
        found = watch.look([pid])[pid]
    return found


def until(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("what", "within", "lost"),
    [
        ("COMPUTING", SLEEP, "blocked without CPU time for 11.0 s"),
        ("COMPUTING", LOOP, None),
        ("RESET", SLEEP, None),
        ("RESET", LOOP, None),
        ("WAITING", SLEEP, None),
        ("IDLE", SLEEP, None),
    ],
)
def test_only_a_process_that_is_blocked_outside_environments_is_lost(what, within, lost):
    clock = Clock()
    watch = Watch(clock)
    with process(what, within) as pid:
        until(lambda: state_of(pid) == ("S" if within == SLEEP else "R"))
        early = looks(watch, clock, pid, 10)
        late = looks(watch, clock, pid, 2)
    assert early.lost is None
    assert late.lost == lost


def test_a_process_that_waits_for_one_that_it_started_is_busy():
    clock = Clock()
    watch = Watch(clock)
    with process("COMPUTING", CHILD) as pid:
        found = []
        for _ in range(30):
            time.sleep(0.05)  # the child's share of the CPU
            found.append(looks(watch, clock, pid, 1).lost)
    assert found == [None] * 30


@pytest.mark.parametrize("what", ["COMPUTING", "RESET", "IDLE"])
def test_a_stopped_process_is_lost_wherever_it_is(what):
    clock = Clock()
    watch = Watch(clock)
    with process(what, LOOP) as pid:
        looks(watch, clock, pid, 1)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state_of(pid) == "T")
        assert looks(watch, clock, pid, 5).lost is None
        assert looks(watch, clock, pid, 1).lost == "stopped for 5.0 s"
        os.kill(pid, signal.SIGCONT)
        until(lambda: state_of(pid) != "T")
        assert looks(watch, clock, pid, 1).lost is None


def test_a_watcher_that_was_away_begins_again():
    clock = Clock()
    watch = Watch(clock)
    with process("COMPUTING", SLEEP) as pid:
        looks(watch, clock, pid, 8)
        clock.now += 60.0
        assert watch.look([pid])[pid].lost is None


def test_a_dead_process_is_gone_and_said_to_have_been_where_it_was():
    clock = Clock()
    watch = Watch(clock)
    with process("RESET", SLEEP) as pid:
        looks(watch, clock, pid, 1)
    assert looks(watch, clock, pid, 6).lost == "its process is gone"
    assert watch.last(pid).doing.what == "reset"


def test_a_process_without_notes_is_not_judged():
    with subprocess.Popen(["sleep", "60"]) as other:
        clock = Clock()
        watch = Watch(clock)
        os.kill(other.pid, signal.SIGSTOP)
        assert looks(watch, clock, other.pid, 20).lost is None
        other.kill()


def test_a_long_wait_is_told_ever_more_rarely():
    last, times = 0.0, []
    for second in range(100):
        if told(second, last):
            last = second
            times.append(second)
    assert times == [10, 20, 40, 80]


def busy():
    while True:
        pass


@pytest.mark.parametrize("within", [lambda: time.sleep(60), busy], ids=["sleep", "loop"])
def test_a_call_in_this_process_that_takes_longer_than_it_may_is_named(within):
    mine().turn(None, ["00000000000000aa"] * 2, [4, 5])
    expected = (
        r"^task family 'slow': reset of environment 1, task 00000000000000bb, seed 6 has not "
        r"returned after 0\.\d s, and environments\.timeout_s is 0\.2"
    )
    began = time.monotonic()

    def reset():
        mine().reset(1, "00000000000000bb", 6)
        within()

    with (
        pytest.raises(EnvironmentFault, match=expected),
        own_environments("task family 'slow'", 0.2, print),
        during(COMPUTING),
    ):
        reset()
    assert time.monotonic() - began < 10


def test_a_call_that_takes_no_longer_than_it_may_goes_on():
    before = signal.getsignal(signal.SIGURG)
    with own_environments("x", 0.2, print), during(RESET):
        os.kill(os.getpid(), signal.SIGURG)
        threading.Event().wait(0.01)
    assert signal.getsignal(signal.SIGURG) is before


class Stuck(gym.Env):
    """The second of several does not return from its reset."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if mine().read().env == 1:
            time.sleep(60)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, True, False, {}


@pytest.mark.parametrize("on_error", ["stop", "restart_episode"])
def test_a_run_without_workers_names_the_environment_that_does_not_return(tmp_path, on_error):
    gym.register("Stuck-v0", entry_point=Stuck)
    text = f"""
    tasks: {{type: gym, id: Stuck-v0, max_episode_steps: 5}}
    workers: {{num: 0}}
    environments: {{timeout_s: 2, on_error: {on_error}}}
    stages: {{meta: {{type: pretrain, env_steps: 100, rollout: {{shards: 1, num_envs: 2}}}}}}
    """
    expected = (
        r"^task family 'gym': reset of environment 1, task \w{16}, seed \d+ has not returned after"
        r" 2\.\d s, and environments\.timeout_s is 2; mend the environment, or allow it more time$"
    )
    with pytest.raises(EnvironmentFault, match=expected):
        controller.run(
            parse_config(text, "run.yaml"), tmp_path / "run", display=Display(quiet=True)
        )
