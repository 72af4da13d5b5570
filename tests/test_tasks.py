"""Tasks of a run: what they are called, which are drawn, and what is told of them."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dmrl_ray import controller
from dmrl_ray.display import Display
from dmrl_ray.envs.grid_nav import GridNav
from dmrl_ray.recording import task_rows
from dmrl_ray.results import load
from dmrl_ray.tasks import make_tasks
from dmrl_ray.types import Task
from dmrl_ray.yaml_config import parse_config
from tests.small_run import create

CONFIG = """
name: tasks
tasks: {type: grid_nav, episodes: 1}
network: {encoder: {type: mlp, sizes: [8]}}
algorithm: {type: ppo, num_steps: 15, epochs: 1, minibatches: 1}
rollout: {shards: 1, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
stages:
  train: {type: pretrain, env_steps: 120, validation_tasks: 2}
"""


class Titled(GridNav):
    """Tasks whose ids are text that cannot name a file."""

    def sample(self, rng, n, split):
        tasks = super().sample(rng, n, split)
        return [replace(task, id=f'"goal" №{task.params["goal"]:g}/\n') for task in tasks]


def test_a_task_is_called_by_its_family_and_parameters_alone():
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


@pytest.mark.parametrize("family", ["grid_nav", "tests.test_tasks:Titled"])
def test_a_task_is_fine_tuned_to_whatever_its_id(family, tmp_path):
    tuning = "stages.tuned={type: finetune, init_from: train, tasks: 2, updates: 1}"
    folder = play(tmp_path / "run", f"tasks.type={family}", tuning)
    tuned = load(folder).query("stage == 'tuned'")
    assert set(tuned["job"]) == {"tuned.0000", "tuned.0001"}
    assert list((folder / "checkpoints").glob("tuned.0001-*.safetensors"))


def test_every_seed_of_a_study_is_validated_and_evaluated_on_the_same_tasks(tmp_path):
    end = "stages.end={type: evaluate, init_from: train, tasks: 3}"
    settings = ("tasks=bandit", "algorithm.num_steps=10", end)
    drawn = [
        load(play(tmp_path / str(i), *settings, *changes), "tasks").query("split != 'train'")
        for i, changes in enumerate([[], ["seed=1"], ["seed=1", "evaluation_seed=1"]])
    ]
    ids = [frame.groupby("split")["task_id"].agg(list) for frame in drawn]
    assert ids[0].to_dict() == ids[1].to_dict()
    assert not set(drawn[1]["task_id"]) & set(drawn[2]["task_id"])
    assert len(drawn[0]) == 2 + 3


def test_the_tasks_table_holds_every_task_that_an_episode_names_once_in_each_split(tmp_path):
    # 21 goals, and collections of 4: all are met in training, some again and again.
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
    assert both.groupby("run_id")["param.goal"].count().to_dict() == {"a": len(here), "b": 0}
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
def test_parameters_of_any_kind_are_kept(params, tmp_path):
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
