"""A run that a signal asks to stop: in every phase, in threads, and what is left of it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.control.stop import SIGNALS
from dmrl_ray.errors import Interrupted
from dmrl_ray.jobs import learner
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.learn.descent import Descent
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.store.files import LocalFiles
from tests.control.test_resume import ROOT, assert_equal

CONFIG = """\
tasks: {type: point_goal}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 8, epochs: 1}
rollout: {shards: 2, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
stages:
  train: {type: pretrain, env_steps: 192, validate_every: 2, validation_tasks: 2}
  special: {type: finetune, init_from: train, rollout: {num_envs: 4}, tasks: 2, updates: 2}
  online: {type: adapt, init_from: train, streams: 2, tasks_per_stream: 2, change: ignore}
  held_out: {type: evaluate, init_from: train, tasks: 2}
"""
METHODS = ("collect", "evaluate", "train", "adapt", "evaluate_steps")


def play(folder, *overrides):
    return controller.run(
        parse_config(CONFIG, "c.yaml", overrides), folder, display=Display(quiet=True)
    )


def on_step(monkeypatch, act):
    """Calls `act` with the number of every step of environments and the call that it is part of."""
    step, count, within = Sampler._step_env, [0], ["", 0]

    def counted(self, storage, t):
        count[0] += 1
        act(count[0], *within)
        return step(self, storage, t)

    def named(name, method):
        def call(self, *arguments):
            if within[0] != "train":  # It collects, too.
                within[:] = name, within[1] + 1
            try:
                return method(self, *arguments)
            finally:
                if within[0] == name:
                    within[0] = ""

        return call

    monkeypatch.setattr(Sampler, "_step_env", counted)
    for name in METHODS:
        monkeypatch.setattr(RolloutWorker, name, named(name, getattr(RolloutWorker, name)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a whole run, and the step in the middle of the last call of each kind."""
    steps = {}
    with pytest.MonkeyPatch.context() as patch:
        on_step(patch, lambda number, name, call: steps.setdefault((name, call), []).append(number))
        folder = play(tmp_path_factory.mktemp("stop") / "whole")
    middle = {name: numbers[len(numbers) // 2] for (name, _), numbers in steps.items()}
    validation = next(numbers for (name, _), numbers in steps.items() if name == "evaluate")
    return folder, middle | {"validation": validation[len(validation) // 2]}


@pytest.mark.parametrize("phase", [*METHODS, "validation"])
def test_a_stop_between_two_steps_of_any_phase_changes_nothing(
    undisturbed, tmp_path, monkeypatch, phase
):
    whole, middle = undisturbed
    made = []

    def act(number, name, call):
        made.append(number)
        if number == middle[phase]:
            signal.raise_signal(signal.SIGHUP)

    on_step(monkeypatch, act)
    with pytest.raises(Interrupted) as stopped:
        play(tmp_path / "run")
    assert stopped.value.exit_code == 129
    assert len(made) == middle[phase]
    monkeypatch.undo()
    controller.resume(tmp_path / "run", display=Display(quiet=True))
    assert_equal(tmp_path / "run", whole)
    events = load(tmp_path / "run", "events")["event"].tolist()
    assert events.count("interrupted") == 1


def test_a_validation_that_was_stopped_loses_no_update(undisturbed, tmp_path, monkeypatch):
    number = undisturbed[1]["validation"]
    on_step(monkeypatch, lambda n, *_: n == number and signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        play(tmp_path / "run")
    metrics = load(tmp_path / "run", "metrics")
    assert metrics["policy_version"].max() == 2
    assert not metrics["name"].str.startswith("validation").any()


@pytest.mark.parametrize("update", [1, 2])
def test_an_update_that_takes_long_is_undone(undisturbed, tmp_path, monkeypatch, update):
    monkeypatch.setattr(learner, "SLOW_S", 0.0)
    optimize, calls = Descent.optimize, []

    def stopped_after_its_steps(self, *arguments, **more):
        answer = optimize(self, *arguments, **more)
        calls.append(answer)
        if len(calls) == update:
            with suppress(Exception):  # As compilers do.
                signal.raise_signal(signal.SIGTERM)
        return answer

    monkeypatch.setattr(Descent, "optimize", stopped_after_its_steps)
    with pytest.raises(Interrupted):
        play(tmp_path / "run")
    monkeypatch.undo()
    metrics = load(tmp_path / "run", "metrics")
    assert metrics["policy_version"].max() == update - 1 or metrics.empty
    controller.resume(tmp_path / "run", display=Display(quiet=True))
    assert_equal(tmp_path / "run", undisturbed[0])


def test_a_commit_ends_before_a_stop(undisturbed, tmp_path, monkeypatch):
    put, names = LocalFiles.put_if_absent, []

    def signalled(self, name, data):
        names.append(name)
        if len(names) == 1:
            signal.raise_signal(signal.SIGTERM)
        return put(self, name, data)

    monkeypatch.setattr(LocalFiles, "put_if_absent", signalled)
    with pytest.raises(Interrupted):
        play(tmp_path / "run", "commit.every_updates=2")
    assert len(names) == 2  # The other one says that the run was interrupted.
    monkeypatch.undo()
    controller.resume(tmp_path / "run", display=Display(quiet=True))
    assert_equal(tmp_path / "run", undisturbed[0])


def handlers():
    return {number: signal.getsignal(number) for number in SIGNALS}


SHORT = "stages={train: {type: pretrain, env_steps: 64, validation_tasks: 2}}"


@pytest.mark.parametrize("more", ["workers.num=0", "stages.train.init_from=rllib:/nothing"])
def test_handlers_of_signals_are_those_of_before_when_a_run_has_ended(tmp_path, more):
    def own(number, frame):
        raise AssertionError

    outer = {number: signal.signal(number, own) for number in SIGNALS}
    before = handlers()
    try:
        try:
            play(tmp_path / "run", SHORT, more)
        except (ValueError, OSError):
            assert "nothing" in more
        else:
            controller.resume(tmp_path / "run", display=Display(quiet=True))
        assert handlers() == before
    finally:
        for number, handler in outer.items():
            signal.signal(number, handler)


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    before, found, folder = handlers(), [], tmp_path / "run"
    thread = threading.Thread(target=lambda: found.append(play(folder, SHORT)))
    thread.start()
    thread.join()
    assert found == [folder]
    assert handlers() == before
    resumed = asyncio.run(asyncio.to_thread(controller.resume, folder, display=Display(quiet=True)))
    assert resumed == folder


HANGING = f"""\
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import typer
from dmrl_ray import __main__ as cli
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.store.files import LocalFiles

step, count = Sampler._step_env, [0]

def hanging(self, storage, t):
    count[0] += 1
    if count[0] == 30:
        print("hangs", flush=True)
        end = time.monotonic() + 60  # In small parts, as signals are heeded between them.
        while time.monotonic() < end:
            time.sleep(0.01)
    return step(self, storage, t)

Sampler._step_env = hanging
cli.app()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once_and_the_commit_is_whole(tmp_path, number):
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "hanging.py").write_text(HANGING)
    process = subprocess.Popen(
        [sys.executable, "hanging.py", "run", "c.yaml", "commit.every_updates=1", "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "hangs\n":
        pass
    os.kill(process.pid, number)
    name = signal.Signals(number).name
    assert process.stderr.readline() == (
        f"{name}: stopping when the environment step in hand has ended; "
        "a second signal stops at once\n"
    )
    asked = time.monotonic()
    os.kill(process.pid, number)
    assert process.wait() == 128 + number
    assert time.monotonic() - asked < 1
    process.communicate()
    assert load(Path(tmp_path / "run"), "metrics")["policy_version"].max() == 1
