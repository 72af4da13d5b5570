"""Tasks of a run: their ids, which are sampled, their table, and which were seen in training."""

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.control.run_state import Run
from dmrl_ray.envs.grid_nav import GridNav
from dmrl_ray.errors import ConfigError, Interrupted
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load, seen_in_training
from dmrl_ray.results.report import text_report
from dmrl_ray.rollout.rows import task_rows
from dmrl_ray.tasks.distribution import make_tasks
from dmrl_ray.types import Task
from tests.store.small_run import create

CONFIG = """
name: tasks
tasks: {type: grid_nav, episodes: 1}
network: {encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 15, epochs: 1, minibatches: 1}
rollout: {shards: 1, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
stages:
  train: {type: pretrain, env_steps: 120, validation_tasks: 2}
"""


class Titled(GridNav):
    """Tasks whose ids are not valid file names."""

    def sample(self, rng, n, split):
        tasks = super().sample(rng, n, split)
        return [replace(task, id=f'"goal" №{task.params["goal"]:g}/\n') for task in tasks]


def test_the_id_of_a_task_depends_on_its_family_and_parameters_alone():
    params = {"length": np.array([0.5, 1.0]), "place": np.array([[1.0, 2.0], [1.0, 2.0]])}
    train, test = (make_tasks("pole", split, params) for split in ("train", "test"))
    assert [task.id for task in train] == [task.id for task in test]
    assert [task.split for task in train + test] == ["train", "train", "test", "test"]
    renamed = {"masspole": params["length"], "place": params["place"]}
    others = make_tasks("cart", "train", params) + make_tasks("pole", "train", renamed)
    assert len({task.id for task in train + others}) == 6


def play(folder, *settings):
    controller.run(parse_config(CONFIG, "c.yaml", list(settings)), folder, display=Display(quiet=1))
    return folder


@pytest.mark.parametrize("family", ["grid_nav", "tests.tasks.test_tasks:Titled"])
def test_a_task_is_fine_tuned_to_whatever_its_id(family, tmp_path):
    tuning = "stages.tuned={type: finetune, init_from: train, tasks: 2, updates: 1}"
    folder = play(tmp_path / "run", f"tasks.type={family}", tuning)
    tuned = load(folder).query("stage == 'tuned'")
    assert set(tuned["job"]) == {"tuned.0000", "tuned.0001"}
    assert list((folder / "checkpoints").glob("tuned.0001-*.safetensors"))


def test_every_seed_of_a_study_is_validated_and_evaluated_on_the_same_tasks(tmp_path):
    end = "stages.end={type: evaluate, init_from: train, tasks: 3}"
    settings = ("tasks=bandit", "algorithm.num_steps=10", end)
    evaluated = [
        load(play(tmp_path / str(i), *settings, *changes), "tasks").query("split != 'train'")
        for i, changes in enumerate([[], ["seed=1"], ["seed=1", "evaluation_seed=1"]])
    ]
    ids = [frame.groupby("split")["task_id"].agg(list) for frame in evaluated]
    assert ids[0].to_dict() == ids[1].to_dict()
    assert not set(evaluated[1]["task_id"]) & set(evaluated[2]["task_id"])
    assert len(evaluated[0]) == 2 + 3


def test_the_tasks_table_holds_every_task_that_an_episode_names_once_in_each_split(tmp_path):
    # 21 goals, and collections of 4: all occur in training, some repeatedly.
    end = "stages.end={type: evaluate, init_from: train, tasks: 40}"
    folder = play(tmp_path / "run", "stages.train.env_steps=6000", end)
    tasks, episodes = load(folder, "tasks"), load(folder)
    name = ["run_id", "task_id", "split"]
    assert not tasks.duplicated(name).any()
    assert set(episodes[name].itertuples(index=False)) == set(tasks[name].itertuples(index=False))
    assert tasks["split"].value_counts()["train"] == 21


def test_single_numbers_among_the_parameters_have_columns_of_their_own(tmp_path):
    here = load(play(tmp_path / "runs" / "a"), "tasks")
    assert here["param.goal"].tolist() == [json.loads(text)["goal"] for text in here["params"]]
    play(tmp_path / "runs" / "b", "tasks={type: bandit}", "algorithm.num_steps=10")
    both = load(tmp_path / "runs", "tasks")
    assert both.groupby("run_id", sort=False)["param.goal"].count().tolist() == [len(here), 0]
    assert len(json.loads(both["params"].iloc[-1])["chance"]) == 5


KINDS = {
    "numbers": [{"mass": 1.0, "sign": -1}, {"mass": 1e-9, "sign": 3}],
    "arrays": [{"at": np.array([0.1, 2.0])}, {"at": np.array([1e30, -1 / 3])}],
    "tables": [{"p": np.arange(12.0).reshape(2, 3, 2), "on": True}] * 2,
    "none": [{}, {}],
    "text": [{"map": 'a"}, {', "n": 1}, {"map": "№", "n": 2}],
    "lists": [{"ids": [1, 2]}, {"ids": []}],
    "not finite": [{"mass": np.inf}, {"mass": 1.0}],
    "of several kinds": [{"mass": 1, "on": np.True_}, {"mass": np.arange(2)}, {}, {"name": "x"}],
}


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_parameters_of_any_type_are_stored(params, tmp_path):
    with create(tmp_path / "run") as writer:
        writer.add("tasks", task_rows([Task(str(i), "f", "test", p) for i, p in enumerate(params)]))
        writer.commit({}, {})
    table = load(tmp_path / "run", "tasks")
    assert [json.loads(text) for text in table["params"]] == [
        {name: np.asarray(value).tolist() for name, value in task.items()} for task in params
    ]
    for name in {name for task in params for name in task}:
        single = [np.nan if np.ndim(task.get(name, [])) else task[name] for task in params]
        numbers = [np.nan if isinstance(value, str) else float(value) for value in single]
        column = table.get(f"param.{name}", pd.Series(np.nan, table.index))
        np.testing.assert_array_equal(column, numbers)


RECORDED = """
  played: {type: evaluate, init_from: train, split: SPLIT, tasks: 4, record: true}
  cloned: {type: pretrain, env_steps: 60, validation_tasks: 6, MORE algorithm: ALGORITHM}
  final: {type: evaluate, init_from: cloned, tasks: 30}
"""


def recorded(split="train", more="", data="stage: played", tasks="{type: bandit}"):
    """A config whose second policy is cloned from episodes of the first."""
    stages = RECORDED.replace("SPLIT", split).replace("MORE", more)
    stages = stages.replace("ALGORITHM", f"{{type: behavior_cloning, data: {{{data}}}}}")
    config = CONFIG.rstrip() + stages.replace("num_steps: 15, ", "")
    return parse_config(config, "c.yaml", [f"tasks={tasks}"])


@pytest.mark.parametrize(
    ("split", "tasks", "sentence"),
    [
        ("validation", "bandit", "4 of the 6 tasks that stage 'cloned' selects on"),
        ("test", "bandit", "4 of the 30 tasks that stage 'final' reports on"),
        ("test", "{type: grid_nav, held_out: 5}", "of the 5 tasks that stage 'final' reports on"),
        ("test", "cartpole", "1 of the 1 tasks that stage 'cloned' selects on"),
    ],
)
def test_a_policy_is_not_evaluated_on_held_out_tasks_that_it_learned_from(split, tasks, sentence):
    with pytest.raises(ConfigError, match=rf"stages.cloned: algorithm.data: .*{sentence}"):
        controller.check(recorded(split, tasks=tasks))
    controller.check(recorded(split, "allow_seen: true,", tasks=tasks))


@pytest.mark.parametrize("tasks", ["bandit", "grid_nav", "cartpole"])
def test_recordings_of_training_tasks_may_be_learned_from(tasks):
    controller.check(recorded(tasks=tasks))


def test_recordings_of_other_runs_are_checked_too(tmp_path):
    config = recorded("test", "allow_seen: true,")
    folder = tmp_path / "run"
    controller.run(config, folder, display=Display(quiet=True))
    data = f"runs: {folder}, stage: played"
    with pytest.raises(ConfigError, match="4 of the 30 tasks that stage 'final' reports on"):
        controller.check(recorded(data=data))
    other = recorded(data=data).model_copy(update={"evaluation_seed": 1})
    controller.check(other)


def test_allow_seen_without_recordings_is_refused():
    with pytest.raises(ConfigError, match="allow_seen: this stage learns from no recordings"):
        controller.check(parse_config(CONFIG, "c.yaml", ["stages.train.allow_seen=true"]))


def seen(folder):
    frame = seen_in_training(folder).set_index("stage")
    return {name: tuple(row) for name, row in frame[["tasks", "starts", "seen"]].iterrows()}


def test_tasks_that_were_trained_on_are_counted_for_each_stage(tmp_path):
    # 6000 steps are 400 trials, of all 21 goals unless some are held out.
    more = [
        "stages.train.env_steps=6000",
        "stages.tuned={type: finetune, init_from: train, tasks: 2, updates: 1}",
        "stages.end={type: evaluate, init_from: train, tasks: 400}",
        "stages.again={type: evaluate, init_from: train, split: train, tasks: 3}",
    ]
    folder = play(tmp_path / "shared", *more)
    assert seen(folder) == {"tuned": (2, 2, 2), "end": (21, 400, 21)}
    assert "test tasks seen in training: 21 of 21 (end: 400 starts)" in text_report(folder)
    assert seen(play(tmp_path / "kept", *more, "tasks.held_out=5"))["end"] == (5, 400, 0)


def test_tasks_of_recordings_count_as_trained_on_and_are_marked(tmp_path):
    folder = tmp_path / "run"
    controller.run(recorded("test", "allow_seen: true,"), folder, display=Display(quiet=True))
    assert seen(folder) == {"played": (4, 4, 0), "final": (30, 30, 4)}
    report = text_report(folder)
    assert "seen in training: 0 of 4 (played: 4 starts)" in report
    assert "seen in training: 4 of 30 (final: 30 starts, allow_seen in cloned)" in report
    for part in (folder / "transitions").iterdir():
        part.unlink()
    assert text_report(folder) == report


def test_the_recordings_learned_from_are_logged_whatever_a_pattern_matches_later(tmp_path):
    one, two, clone = (tmp_path / name for name in ("made/one", "made/two", "clone"))
    recording = recorded("test", "allow_seen: true,")
    controller.run(recording, one, display=Display(quiet=True))
    data = f"runs: '{tmp_path}/made/*', stage: played"
    config = recorded(more="allow_seen: true,", data=data)
    controller.run(config, clone, display=Display(quiet=True))
    report = text_report(clone)
    assert "test tasks seen in training: 4 of 30 (final: 30 starts, allow_seen" in report
    (noted,) = load(clone, "events").query("event == 'learned_from'")["detail"]
    assert json.loads(noted)["runs"] == [load(one)["run_id"].iloc[0]]
    one.rename(tmp_path / "elsewhere")
    controller.run(
        recording.model_copy(update={"evaluation_seed": 1}), two, display=Display(quiet=1)
    )
    assert text_report(clone) == report


CLONING = (
    "type: pretrain, env_steps: 60, validation_tasks: 6, algorithm: {type: behavior_cloning, data: "
)
RECORDED_TWICE = f"""
  played: {{type: evaluate, init_from: train, split: test, tasks: 4, record: true}}
  taught: {{ALLOWED {CLONING} {{stage: played}}}}}}
  replayed: {{type: evaluate, init_from: taught, split: train, tasks: 4, record: true}}
  cloned: {{{CLONING} {{stage: replayed}}}}}}
  final: {{type: evaluate, init_from: cloned, tasks: 30}}
"""


def recorded_twice(allowed=""):
    text = CONFIG.rstrip() + RECORDED_TWICE.replace("ALLOWED", allowed)
    return parse_config(text, "c.yaml", ["tasks=bandit", "algorithm.num_steps=10"])


def test_tasks_are_tracked_through_policies_that_were_recorded(tmp_path):
    with pytest.raises(ConfigError, match=r"stages.taught: .* 4 of the 30 tasks"):
        controller.check(recorded_twice())
    folder = tmp_path / "run"
    controller.run(recorded_twice("allow_seen: true,"), folder, display=Display(quiet=True))
    assert seen(folder)["final"] == (30, 30, 4)
    assert "4 of 30 (final: 30 starts, allow_seen in taught)" in text_report(folder)
    with pytest.raises(ConfigError, match="4 of the 30 tasks that stage 'final' reports on"):
        controller.check(recorded(data=f"runs: {folder}, stage: replayed"))


def test_tasks_of_episodes_that_never_ended_count_as_trained_on(tmp_path):
    # Three collections of 4 steps, of episodes of 15.
    short = ["algorithm.num_steps=4", "stages.train.env_steps=48"]
    folder = play(
        tmp_path / "run", *short, "stages.end={type: evaluate, init_from: train, tasks: 400}"
    )
    assert not len(load(folder).query("split == 'train'"))
    trained = load(folder, "trained_on")
    assert set(trained["task_id"]) == set(
        load(folder, "tasks").query("split == 'train'")["task_id"]
    )
    assert seen(folder)["end"] == (21, 400, 4)


def test_starts_of_fine_tuning_are_those_of_finished_jobs(tmp_path, monkeypatch):
    save = Run.save_policy

    def interrupt(run, name, *rest):
        save(run, name, *rest)
        if name == "tuned.0001":
            run.stop.number = signal.SIGTERM

    monkeypatch.setattr(Run, "save_policy", interrupt)
    tuning = "stages.tuned={type: finetune, init_from: train, tasks: 9, updates: 1}"
    with pytest.raises(Interrupted):
        play(tmp_path / "run", tuning)
    assert "(tuned: 2 starts)" in text_report(tmp_path / "run")


PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)
    return text


def test_the_code_of_the_page_joins_every_episode_with_its_parameters(tmp_path, monkeypatch):
    play(tmp_path / "runs" / "smoke")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("python"), names)
    assert names["both"]["param.goal"].notna().all()
    assert len(names["both"]) == len(names["episodes"])


def test_the_stage_of_the_page_can_be_learned_from():
    text = CONFIG.replace("  train:", "  experts:") + "  " + block("yaml")
    cloned = (
        "stages.cloned={type: pretrain, env_steps: 60, algorithm: {type: behavior_cloning, DATA}}"
    )
    controller.check(
        parse_config(text, "c.yaml", [cloned.replace("DATA", "data: {stage: played}")])
    )


def test_the_page_quotes_the_report(tmp_path):
    stages = [
        "stages.train.env_steps=6000",
        "stages.held_out={type: evaluate, init_from: train, tasks: 256}",
    ]
    assert block("text").strip() in text_report(play(tmp_path / "run", *stages))


def test_training_tasks_are_fine_tuned_to_and_scored(tmp_path):
    tuning = "{type: finetune, init_from: train, split: train, tasks: 2, updates: 1}"
    rows = load(play(tmp_path / "run", f"stages.tuned={tuning}")).query("stage == 'tuned'")
    assert set(rows["split"]) == {"train"}
    assert rows["score"].notna().all()
