"""What a process does can be read by others, whatever it is in and after its death."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.jobs.spec import JobSpec, build
from dmrl_ray.tasks.activity import COMPUTING, ActivityOf, during, mine

ROOT = Path(__file__).resolve().parents[2]

IN_A_CALL = """
import time
from dmrl_ray.tasks.activity import COMPUTING, during, mine
with during(COMPUTING):
    mine().reset(3, "00000000000000ff", 7)
    print("x", flush=True)
    {}
"""


@pytest.mark.parametrize("within", ["time.sleep(60)", "while True: pass", "sum(range(10**12))"])
def test_a_process_that_does_not_answer_is_read_and_so_is_a_dead_one(within):
    # The last of the three holds the interpreter's lock.
    command = [sys.executable, "-c", IN_A_CALL.format(within)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        notes = ActivityOf(process.pid)
        alive = notes.read()
        process.kill()
    assert str(alive) == "reset of environment 3, task 00000000000000ff, seed 7"
    assert 0 <= time.monotonic() - alive.since < 30
    assert notes.read() == alive


def test_a_process_without_notes_is_said_to_have_none():
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(FileNotFoundError, match=f"process {process.pid} keeps no notes"):
            ActivityOf(process.pid)
        process.kill()


READER = """
import os
from dmrl_ray.tasks.activity import COMPUTING, ActivityOf, mine
other = ActivityOf({})
lower = open("/dev/null")  # so that the number of its own file is above the other's
mine().begin(COMPUTING)
print(ActivityOf(os.getpid()).read().what, other.read().what)
"""


def test_the_notes_of_a_process_that_reads_others_are_its_own():
    command = [sys.executable, "-c", IN_A_CALL.format("time.sleep(60)")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        reader = [sys.executable, "-c", READER.format(process.pid)]
        answer = subprocess.run(reader, cwd=ROOT, capture_output=True, text=True)
        process.kill()
    assert answer.stdout == "computing reset\n"


def test_what_was_done_before_is_noted_again():
    with during(COMPUTING):
        notes = ActivityOf(os.getpid())
        with during(COMPUTING + 1):
            assert notes.read().what == "reset"
        assert notes.read().what == "computing"


def test_single_environments_are_named_with_their_tasks_and_seeds(monkeypatch):
    varied = Component(type="gym", id="CartPole-v1", vary={"gravity": [5, 15]})
    parts = {"network": Component(type="actor_critic"), "algorithm": Component(type="ppo")}
    rollout = RolloutSettings(num_envs=2)
    program = build(JobSpec("meta", "meta", 0, tasks=varied, rollout=rollout, **parts))
    sampler, policy = program.sampler(2), program.policy
    tasks = program.distribution.sample(np.random.default_rng(0), 2, "train")
    found = []
    for env in sampler.env.envs:
        for method in ("reset", "step"):
            monkeypatch.setattr(env.env, method, noting(getattr(env.env, method), found))
    sampler.start(np.random.default_rng(1), 0)
    sampler.begin_trial(tasks, policy)
    sampler.rollout(policy, 1)
    seeds = [env.seed for env in sampler.env.envs]
    assert [(d.what, d.env, d.task, d.seed) for d in found] == [
        (what, b, tasks[b].id, seeds[b]) for what in ("reset", "step") for b in range(2)
    ]
    assert mine().read().what == "computing"


def noting(method, found):
    def call(*arguments, **named):
        found.append(mine().read())
        return method(*arguments, **named)

    return call
