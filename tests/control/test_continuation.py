"""A run that is trained for longer is the run that had the larger budget from the start."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from test_resume import Server, assert_equal, steps, weights
from typer.testing import CliRunner

from dmrl_ray import __main__ as cli
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import continuation, controller
from dmrl_ray.control.train_loop import Progress
from dmrl_ray.errors import IncompatibleSettings
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load, run_config
from dmrl_ray.results.report import _finished, text_report
from dmrl_ray.store.commit_records import load_run_config, newest_commit, settings_changed, verify

CONFIG = """\
name: longer
tasks: {type: cartpole}
network: {encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 16, epochs: 1}
rollout: {shards: 2, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
commit: {every_updates: 2}
stages:
  train: {type: pretrain, env_steps: 512, validate_every: 2, validation_tasks: 2, record: true}
  apart: {type: pretrain, env_steps: 512, validate_every: 2, validation_tasks: 2}
  special: {type: finetune, init_from: train, tasks: 2, updates: 1}
  held_out: {type: evaluate, init_from: train, tasks: 3}
  cloned:
    type: pretrain
    algorithm: {type: behavior_cloning, num_steps: 16, data: {stage: train}}
    env_steps: 256
    validation_tasks: 2
"""
LONGER = "stages.train.env_steps=1024"


def play(folder: Path, *overrides: str, display: Display | None = None) -> Path:
    config = parse_config(CONFIG, "longer.yaml", overrides)
    return controller.run(config, folder, display=display or Display(quiet=True))


def resume(folder: Path, *overrides: str) -> str:
    """Go on, and return what was shown."""
    stream = io.StringIO()
    controller.resume(folder, overrides=overrides, display=Display(stream=stream))
    return stream.getvalue()


def events(folder: Path, event: str) -> pd.DataFrame:
    found = load(folder, table="events")
    return found[found["event"] == event]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return play(tmp_path_factory.mktemp("short") / "run")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return play(tmp_path_factory.mktemp("long") / "run", LONGER)


@pytest.fixture
def run(short, tmp_path):
    """A finished run that a test may go on with."""
    return Path(shutil.copytree(short, tmp_path / "run"))


@pytest.fixture(scope="module")
def grown(short, tmp_path_factory):
    folder = Path(shutil.copytree(short, tmp_path_factory.mktemp("grown") / "run"))
    return folder, resume(folder, LONGER)


def assert_same(folder: Path, other: Path) -> None:
    assert_equal(folder, other)
    pd.testing.assert_frame_equal(steps(folder), steps(other))
    assert verify(folder) == []


def test_training_on_ends_in_the_weights_and_rows_of_the_larger_budget_from_the_start(grown, long):
    assert_same(grown[0], long)


def test_stages_that_go_back_to_what_was_trained_on_are_played_again_and_others_are_not(grown):
    folder, shown = grown
    again = "played again: special, held_out, cloned"
    assert f"stage 'train' trains for 1,024 environment steps instead of 512; {again}\n" in shown
    started = events(folder, "stage_started")["stage"].tolist()
    assert started == ["train", "apart", "train", "special", "held_out", "cloned"]


def test_files_that_others_read_hold_each_row_once(grown):
    for table in ("episodes", "metrics", "events", "transitions"):
        parts = sorted((grown[0] / table).glob("part-*.parquet"))
        found = pd.concat(map(pd.read_parquet, parts))
        assert len(found) == len(load(grown[0], table)) > 0


def test_readers_go_by_the_config_in_force(grown):
    folder = grown[0]
    assert settings_changed(folder) == [LONGER]
    assert load_run_config(folder).stages["train"].env_steps == 1024
    assert run_config(folder)["stages"]["train"]["env_steps"] == 1024
    report = text_report(folder)
    assert f"changed since  {LONGER}" in report
    assert "| train  " in report
    assert "| 1.02k     | 8 " in report
    assert "training_extended" in report
    frame = controller.evaluate(
        folder, stage="train", split="test", tasks=2, trials=1, checkpoint="last"
    )
    assert set(frame["policy_version"]) == {8}


def test_training_that_went_on_is_timed_once(grown):
    finished = events(grown[0], "job_finished").query("stage == 'train'")
    first, last = (json.loads(detail)["seconds"] for detail in finished["detail"])
    assert _finished(finished, "seconds") == last > first


def test_a_run_may_be_trained_on_again_and_again(run, long):
    for env_steps in (768, 1024):
        resume(run, f"stages.train.env_steps={env_steps}")
    assert_same(run, long)
    assert "all stages are done already" in resume(run, LONGER)


def test_a_run_killed_while_it_is_trained_on_ends_like_the_undisturbed(short, long, tmp_path):
    server = Server(tmp_path, config=CONFIG)
    try:
        folder = Path(shutil.copytree(short, tmp_path / "whole"))
        operations = server.play("resume", folder, changed=[LONGER])["operations"]
        # The commit that extends is among the first; all of those, and some of the rest.
        for k in [*range(1, 24, 2), *range(24, operations + 1, operations // 4)]:
            folder = Path(shutil.copytree(short, tmp_path / str(k)))
            status = server.play("resume", folder, crash_at=k, changed=[LONGER])["status"]
            assert os.WIFSIGNALED(status)
            extended = settings_changed(folder) == [LONGER]
            both = set(load(folder)["stage"])
            assert both == ({"train", "apart"} if extended and k < 24 else both)
            assert server.play("resume", folder, changed=[LONGER])["status"] == 0
            assert_same(folder, long)
            shutil.rmtree(folder)
    finally:
        server.process.kill()


class Stopping(Display):
    """Ends a run in the middle of a stage, after a commit within it."""

    def __init__(self, stage: str) -> None:
        super().__init__(quiet=True)
        self.ends_in = stage

    def update(self, stage, steps, *figures, **more):
        if stage == self.ends_in and steps > 256:
            raise KeyboardInterrupt


def test_a_job_in_progress_waits_while_an_earlier_stage_is_trained_on(tmp_path, long):
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", display=Stopping("apart"))
    assert newest_commit(tmp_path / "run").state["jobs"].keys() == {"train", "apart"}
    resume(tmp_path / "run", LONGER)
    assert events(tmp_path / "run", "job_resumed")["stage"].tolist() == ["train", "apart"]
    assert_same(tmp_path / "run", long)


def test_a_stage_in_progress_takes_a_larger_budget(tmp_path, long):
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", display=Stopping("train"))
    resume(tmp_path / "run", LONGER)
    assert_same(tmp_path / "run", long)


def test_a_folder_that_keeps_one_job_alone_goes_on_with_it(tmp_path, long):
    from dmrl_ray.store.writer import RunWriter

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", LONGER, display=Stopping("apart"))
    with RunWriter.open(tmp_path / "run") as writer:
        state = dict(writer.state)
        jobs = state.pop("jobs")
        del state["changed"]
        writer.commit(state | {"job": jobs["apart"]}, writer.files)
    with pytest.raises(IncompatibleSettings, match="whose learner's state was not kept"):
        resume(tmp_path / "run", "stages.train.env_steps=2048")
    resume(tmp_path / "run")
    assert_equal(tmp_path / "run", long)


def test_what_is_not_as_from_the_start_is_said_on_screen_and_in_an_event(tmp_path):
    folder = play(tmp_path / "run", "algorithm.anneal_lr=true", "stages.train.validate_every=3")
    shown = resume(folder, LONGER)
    (detail,) = events(folder, "extension_not_exact")["detail"]
    message = json.loads(detail)["message"]
    assert message == (
        "stage 'train' will not end as if it had the larger budget from the start: anneal_lr went "
        "by the smaller budget until here, and the policy that ended the smaller one was "
        "validated, too, and may be best"
    )
    assert message in shown


def test_a_look_at_the_smaller_budgets_end_changes_no_weight_that_trains(tmp_path):
    three = "stages.train.validate_every=3"
    folder = play(tmp_path / "run", three)
    resume(folder, LONGER)
    whole = play(tmp_path / "whole", three, LONGER)
    for name in ("train.last", "train.learner", "train.shards"):
        assert weights(folder)[name] == weights(whole)[name]
    train, from_start = (load(f).query("stage == 'train'") for f in (folder, whole))
    extra = train[(train["split"] == "validation") & (train["env_steps"] == 512)]
    assert len(train) - len(extra) == len(from_start)
    assert len(extra) == 2


def call(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def commits(folder: Path) -> int:
    return len(list((folder / "commits").iterdir()))


def test_every_setting_that_a_run_cannot_go_on_with_is_named_with_its_place(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    other = CONFIG.replace("cartpole", "point_goal").replace("tasks: 3", "tasks: 4")
    other = other.replace("threads: 1", "threads: 2").replace("env_steps: 256", "env_steps: 128")
    Path("other.yaml").write_text(other)
    before = commits(run)
    answer = call("run", "other.yaml", "seed=77", "algorithm.lr=1e-4", "--out", "run", "--resume")
    assert answer.exit_code == 2
    leave = "; leave it as it is, or start another run in another folder"
    for told in (
        f"other.yaml:2:1: tasks: found point_goal, and this run has cartpole{leave}",
        f"other.yaml:7:12: learners.threads: found 2, and this run has 1{leave}",
        f"other.yaml:13:48: stages.held_out.tasks: found 4, and this run has 3{leave}",
        "other.yaml:17:5: stages.cloned.env_steps: found 128, and this run has 256; a budget may "
        "grow and not shrink",
        f"command line: seed: found 77, and this run has 0{leave}",
        f"command line: algorithm.lr: found 0.0001, and this run has 0.001{leave}",
    ):
        assert told in answer.stderr
    assert answer.stderr.count("and this run has") == 6
    assert "Traceback" not in answer.stderr
    assert commits(run) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("stages.special.updates=2", "stages.special.updates: found 2, and this run has 1"),
        ("stages.train.env_steps=100", "a budget may grow and not shrink"),
        ("learners.precision=bfloat16", "found bfloat16, and this run has float32"),
        ("stages.trian.env_steps=2k", "there is no stage 'trian'; did you mean 'train'?"),
    ],
)
def test_resume_refuses_what_would_make_another_run(run, change, told):
    before = commits(run)
    answer = call("resume", str(run), change)
    assert answer.exit_code == 2
    assert f"command line: {change.partition('=')[0]}: " in answer.stderr
    assert told in answer.stderr
    assert commits(run) == before


def test_stages_cannot_come_or_go_or_change_places(run):
    config = parse_config(CONFIG, "longer.yaml")
    names = list(config.stages)
    for chosen, told in (
        (names[:-1], "stages.cloned: found none, and this run has pretrain"),
        (["apart", "train", *names[2:]], "stages: this run has another order of them: train"),
    ):
        other = config.model_copy(update={"stages": {n: config.stages[n] for n in chosen}})
        with pytest.raises(IncompatibleSettings, match=told):
            controller.resume(run, config=other, display=Display(quiet=True))


def test_what_changes_the_speed_alone_may_change_and_stays_changed(run, tmp_path, short):
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.replace("num: 0", "num: auto").replace("every_updates: 2", "keep: 5"))
    answer = call("run", str(other), "--out", str(run), "--resume")
    assert answer.exit_code == 0, answer.output
    found = load_run_config(run)
    assert (found.commit.keep, found.commit.every_updates, found.workers.num) == (5, None, 0)
    assert weights(run) == weights(short)
    assert newest_commit(run).keep == 5


def test_a_committed_progress_is_checked_field_by_field():
    assert set(continuation._Progress.model_fields) == {f.name for f in fields(Progress)}
