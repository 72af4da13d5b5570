"""What a run keeps of itself when it goes back to its newest commit, and when it ends early."""

import json
import signal

import numpy as np
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller, stages
from dmrl_ray.control.run_state import Run
from dmrl_ray.envs.grid_nav import GridNav
from dmrl_ray.errors import Interrupted
from dmrl_ray.jobs.spec import job_spec
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.store.writer import RunWriter
from dmrl_ray.tasks.score import Reference

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


def test_success_and_score_of_an_episode_do_not_depend_on_the_rows_beside_it(run):
    spec = job_spec(run.config, "meta")
    zeros = {"trial": 0, "episode": 0, "adaptation_step": 0, "policy_version": 0, "env_steps": 0}
    cells = {"task_id": list("abc"), "split": "test", "length": 1, "greedy": True, **zeros}
    told = {"success": np.array([1, np.nan, 0.0]), "score": np.array([np.nan, 0.5, 1])}
    run.writer.add_episodes(spec, {**cells, "return": np.zeros(3), **told})
    run.commit()
    rows = load(run.writer.folder)
    assert rows["success"].isna().tolist() == [False, True, False]
    assert rows["success"].dropna().tolist() == [True, False]
    np.testing.assert_array_equal(rows["score"], [np.nan, 0.5, 1])


def test_a_rollback_before_the_first_commit_forgets_everything(run):
    run.state["jobs"]["meta"] = {"updates": 3}
    run.save("meta.best", {"weight": np.zeros(3)})
    run.rollback()
    assert not any(run.state.values())
    assert run.files == {}


TWO_STAGES = """\
tasks: {type: bandit}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [4]}}
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
    config, stage = parse_config(TWO_STAGES, "run.yaml"), stages.run_stage

    def ended_by(act, error):
        def run_stage(run, name):
            stage(run, name)
            if name == "held_out":
                act(run)

        monkeypatch.setattr(stages, "run_stage", run_stage)
        with pytest.raises(error):
            controller.run(config, tmp_path / "run", display=Display(quiet=True))
        monkeypatch.undo()
        return tmp_path / "run"

    return ended_by


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


class Level(GridNav):
    """On some goals nobody can be better than random play, and of others nothing is known."""

    def reference(self, task):
        ends = super().reference(task)
        level = Reference(ends.oracle, ends.oracle)
        return (level, None, ends)[int(task.params["goal"]) % 3]


def test_models_are_chosen_by_returns_unless_every_task_has_a_score(tmp_path):
    config = TWO_STAGES.replace("bandit}", '"tests.control.test_run:Level", episodes: 1}').replace(
        "4}", "30}"
    )
    config = config.replace("num_steps: 10", "num_steps: 15")
    folder = tmp_path / "run"
    controller.run(parse_config(config, "c.yaml"), folder, display=Display(quiet=True))
    rows, tasks = load(folder).query("split == 'validation'"), load(folder, "tasks")
    goals = tasks.drop_duplicates("task_id").set_index("task_id")["param.goal"]
    unknown = rows["task_id"].map(goals) % 3 < 2
    assert (rows["score"].isna() == unknown).all()
    names = set(load(folder, "metrics")["name"])
    assert {"validation_return", "validation_score"} & names == {"validation_return"}
    (best,) = load(folder, "events").query("event == 'best_policy'")["detail"]
    assert json.loads(best)["score"] == pytest.approx(rows["return"].mean())


def test_what_evaluate_plays_is_told_like_what_a_stage_plays(tmp_path):
    config = TWO_STAGES.replace("env_steps: 40", "env_steps: 120")
    folder = tmp_path / "run"
    controller.run(parse_config(config, "c.yaml", ["seed=3"]), folder, display=Display(quiet=True))
    asked = {"stage": None, "split": "test", "tasks": 4, "trials": 1, "checkpoint": "last"}
    frame = controller.evaluate(folder, **asked)
    stage = load(folder).query("stage == 'held_out'")
    assert stage.columns.drop(["job", "change", "time"]).isin(frame.columns).all()
    assert set(frame["run_id"]) == set(stage["run_id"])
    assert set(frame["seed"]) == {3}
    assert set(frame["policy_version"]) == {3}
    assert set(frame["env_steps"]) == {120}
