"""Every config that is shipped is complete, and the small one runs from end to end."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import dmrl_ray
from dmrl_ray import __main__ as cli
from dmrl_ray.config.loading import load_config, parse_config, resolved
from dmrl_ray.control import controller

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The run of smoke.yaml in one process, and what it printed."""
    folder = tmp_path_factory.mktemp("configs") / "smoke"
    answer = CliRunner().invoke(cli.app, ["run", "smoke", "workers.num=0", "--out", str(folder)])
    assert answer.exit_code == 0, answer.output
    return folder, answer.stdout


def short(path):
    return path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_every_config_builds_all_its_programs(path):
    controller.check(load_config(path))


@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_every_config_reads_back_from_its_resolved_form(path):
    config = load_config(path)
    assert parse_config(resolved(config), "resolved") == config


@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_a_config_is_named_as_its_file_and_has_a_comment_on_its_purpose(path):
    assert load_config(path).name == path.stem
    assert path.read_text().startswith("# ")


def test_smoke_has_all_four_stages():
    stages = load_config(next(p for p in CONFIGS if p.stem == "smoke")).stages.values()
    assert {stage.type for stage in stages} == {"pretrain", "finetune", "adapt", "evaluate"}


def test_every_stage_of_smoke_writes_its_episodes(smoke):
    # 20 steps an episode: 80k steps are 4000 episodes, and 16 tasks are validated on every 5
    # updates; 8 jobs have 4 rounds of 10 episodes; 8 streams x 2 tasks x 4 episodes x 10
    # environments, by an agent that goes on, one that is restarted and one that never adapts;
    # 32 tasks x 10 columns x 3 steps.
    episodes = dmrl_ray.load(smoke[0])
    counts = episodes.groupby(["stage", "split"]).size().to_dict()
    expected = {("specialise", "test"): 8 * 4 * 10, ("stream", "test"): 3 * 8 * 2 * 4 * 10}
    assert counts[("meta", "train")] >= 4000
    assert counts[("multitask", "train")] >= 4000
    assert counts[("meta", "validation")] > 0
    assert expected.items() <= counts.items()
    assert counts[("held_out", "test")] == 32 * 10 * 3
    assert (episodes["length"] == 20).all()


def test_tasks_of_different_splits_of_smoke_are_different(smoke):
    tasks = dmrl_ray.load(smoke[0], table="tasks")
    assert tasks["task_id"].is_unique
    assert {"validation", "test"} <= set(tasks["split"])
    episodes = dmrl_ray.load(smoke[0])
    held_out = set(episodes.loc[episodes["split"] == "test", "task_id"])
    assert held_out.isdisjoint(episodes.loc[episodes["split"] != "test", "task_id"])
    assert held_out <= set(tasks["task_id"])


def test_smoke_measures_regret_at_every_step_since_a_change(smoke):
    metrics = dmrl_ray.load(smoke[0], table="metrics")
    for name in ("regret_first", "regret_since_change"):
        regret = metrics[metrics["name"] == name]
        assert set(regret["job"]) == {"stream", "stream.restarted", "stream.unadapted"}
        for _, rows in regret.groupby("job"):
            assert rows["env_steps"].tolist() == list(range(1, 4 * 20 + 1))
            assert (rows["value"] > 0).all()
        low = metrics[metrics["name"] == f"{name}_low"]
        assert (low["value"].to_numpy() < regret["value"].to_numpy()).all()


def test_events_of_smoke_list_its_stages_in_order(smoke):
    events = dmrl_ray.load(smoke[0], table="events")
    stages = list(load_config(smoke[0] / "config.yaml").stages)
    for event in ("stage_started", "stage_finished"):
        assert events.loc[events["event"] == event, "stage"].tolist() == stages
    assert events["event"].iloc[-1] == "run_finished"


def test_the_report_of_smoke_shows_adaptation_regret_and_training(smoke):
    report = smoke[1]
    for title in ("Adaptation on held-out tasks", "Regret per step", "Training"):
        assert title in report
    held_out = report[report.index("| held_out") :].split("\n\n")[0].splitlines()[:3]
    assert held_out[1].startswith("| maml")
    assert [line.split("|")[2].strip() for line in held_out] == ["0", "10", "20"]
    assert all(line.count("[") == 2 for line in held_out)  # Of the return and of the score.


def test_a_run_that_is_done_can_be_resumed_and_stays_as_it_is(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke[0].glob("*/*")}
    answer = CliRunner().invoke(cli.app, ["resume", str(smoke[0])])
    assert answer.exit_code == 0
    assert "all stages are done already" in answer.stdout + answer.stderr
    after = {path: path.stat().st_mtime_ns for path in smoke[0].glob("*/*")}
    parts = {path: when for path, when in after.items() if path.parent.name == "episodes"}
    assert parts.items() <= before.items()
