"""What a run keeps of itself when it goes back to its newest commit, and when it ends early."""

import json
import signal

import numpy as np
import pytest

from dmrl_ray import controller
from dmrl_ray.display import Display
from dmrl_ray.errors import Interrupted
from dmrl_ray.results import load
from dmrl_ray.run import Run
from dmrl_ray.writer import RunWriter
from dmrl_ray.yaml_config import parse_config

CONFIG = "{tasks: bandit, workers: {num: 0}, stages: {meta: {type: pretrain, env_steps: 1}}}"


@pytest.fixture
def run(tmp_path):
    with RunWriter.create(tmp_path / "run", CONFIG, {}) as writer:
        yield Run(parse_config(CONFIG, "run.yaml"), writer, Display(quiet=True), None)


def test_tasks_dropped_by_a_rollback_are_written_when_they_are_met_again(run):
    known = run.tasks("validation", 3)
    run.commit()
    lost = run.tasks("test", 2)
    run.rollback()
    run.tasks("validation", 3)
    run.tasks("test", 2)
    run.commit()
    written = load(run.writer.folder, table="tasks")["task_id"].tolist()
    assert sorted(written) == sorted(task.id for task in known + lost)


def test_a_rollback_before_the_first_commit_forgets_everything(run):
    run.state["jobs"]["meta"] = {"updates": 3}
    run.save("meta.best", {"weight": np.zeros(3)})
    run.rollback()
    assert run.state == {"done": [], "jobs": {}, "versions": {}, "changed": {}}
    assert run.files == {}


TWO_STAGES = """\
tasks: {type: bandit}
network: {type: actor_critic, encoder: {type: mlp, sizes: [4]}}
algorithm: {type: ppo, num_steps: 10}
rollout: {shards: 1, num_envs: 4}
workers: {num: 0}
stages:
  meta: {type: pretrain, env_steps: 40, validation_tasks: 4}
  held_out: {type: evaluate, init_from: meta, tasks: 4}
"""


@pytest.fixture
def ended_by(tmp_path, monkeypatch):
    """Runs both stages until `act` ends the second, whose rows are not committed yet."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    config, stage = parse_config(TWO_STAGES, "run.yaml"), controller.run_stage

    def ended_by(act, error):
        def run_stage(run, name):
            stage(run, name)
            if name == "held_out":
                act(run)

        monkeypatch.setattr(controller, "run_stage", run_stage)
        with pytest.raises(error):
            controller.run(config, tmp_path / "run", display=Display(quiet=True))
        monkeypatch.undo()
        return tmp_path / "run"

    yield ended_by
    for number, handler in handlers.items():  # A run takes them over.
        signal.signal(number, handler)


def asked_to_stop(run):
    signal.raise_signal(signal.SIGTERM)
    run.check()


def broken(run):
    raise KeyError("ours")


def end_of(folder):
    """Name, stage and detail of the last event."""
    last = load(folder, table="events").iloc[-1]
    return last["event"], last["stage"], json.loads(last["detail"])


def test_a_run_that_is_stopped_says_so_in_its_events(ended_by):
    event, stage, detail = end_of(ended_by(asked_to_stop, Interrupted))
    assert (event, stage) == ("interrupted", "held_out")
    assert detail == {"reason": "interrupted by signal 15"}


def test_a_failure_of_ours_is_an_event_with_its_traceback(ended_by):
    event, stage, detail = end_of(ended_by(broken, KeyError))
    assert (event, stage) == ("run_failed", "held_out")
    assert (detail["error"], detail["reason"]) == ("KeyError", "'ours'")
    assert "in broken\n" in detail["traceback"]


@pytest.mark.parametrize(("act", "error"), [(asked_to_stop, Interrupted), (broken, KeyError)])
def test_rows_after_the_newest_commit_are_not_there_twice_after_a_resume(ended_by, act, error):
    folder = ended_by(act, error)
    assert (load(folder)["stage"] == "meta").all()
    controller.resume(folder, display=Display(quiet=True))
    assert (load(folder)["stage"] == "held_out").sum() == 4
    assert load(folder, table="events")["event"].iloc[-1] == "run_finished"
