"""Trials are K episodes, advantages do not know where a rollout ended, and tables say who acted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.control import controller
from dmrl_ray.control.train_loop import Validation, tasks_at_once
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import CollectCall
from dmrl_ray.jobs.spec import JobSpec, Weights, build, load_family
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from tests.matrix_family import LIMIT, SHORT, LazyWalk

MLP = {"type": "actor_critic", "encoder": {"type": "mlp", "hidden_sizes": [8]}}
GRU = {"type": "actor_critic", "encoder": {"type": "gru", "hidden_size": 8}}
WALK = {"type": "tests.matrix_family:Walk"}
POLES = {"type": "gym", "id": "CartPole-v1", "vary": {"gravity": [5, 15]}}
META = {"type": "pretrain", "env_steps": 1, "validation_tasks": 2}
START = {"init_from": "meta", "checkpoint": "last"}


def play(folder, tasks, algorithm, network=MLP, columns=8, shards=1, **stages):
    """A run with one iteration of pretraining, and then these stages."""
    config = {
        "tasks": tasks,
        "network": network,
        "algorithm": algorithm,
        "rollout": {"shards": shards, "num_envs": columns},
        "workers": {"num": 0},
        "learners": {"threads": 1},
        "stages": {"meta": META, **stages},
    }
    controller.run(parse_config(json.dumps(config), "c.yaml"), folder, display=Display(quiet=True))
    return folder


def rows(folder, table="episodes", **where):
    """Rows of a table where columns have these values."""
    frame = load(folder, table=table)
    for name, value in where.items():
        frame = frame[frame[name] == value]
    return frame


@pytest.fixture(scope="module")
def five_shot(tmp_path_factory):
    """MAML with five episodes a task between gradient steps, on poles that fall when they do."""
    maml = {"type": "maml", "episodes_per_task": 5, "evaluation_steps": 1, "epochs": 1}
    held_out = {"type": "evaluate", **START, "tasks": 2, "record": True}
    folder = tmp_path_factory.mktemp("five_shot") / "run"
    return play(folder, POLES, maml, columns=10, held_out=held_out)


def test_recorded_adaptation_steps_have_exactly_their_episodes(five_shot):
    steps = rows(five_shot, "transitions", stage="held_out")
    episodes = steps[["task_id", "adaptation_step", "environment", "episode"]].drop_duplicates()
    counts = episodes.groupby(["task_id", "adaptation_step"]).size()
    assert counts.tolist() == [5] * 4
    assert len(steps) == rows(five_shot, stage="held_out")["length"].sum()


def test_inner_steps_see_exactly_their_episodes_in_training(five_shot):
    trained = rows(five_shot, split="train")
    assert trained.groupby(["task_id", "adaptation_step"]).size().tolist() == [5] * 4


def test_returns_before_and_after_are_mean_returns_of_episodes(five_shot):
    metrics = rows(five_shot, "metrics", stage="meta").set_index("name")["value"]
    trained = rows(five_shot, split="train")
    for name, step in (("return/before", 0), ("return/after", 1)):
        mean = trained[trained["adaptation_step"] == step]["return"].mean()
        assert metrics[name] == pytest.approx(mean)


def test_rl2_trains_on_trials_of_k_episodes(tmp_path):
    folder = play(tmp_path / "run", {**POLES, "episodes": 2}, {"type": "rl2", "epochs": 1}, GRU)
    counts = rows(folder, split="train").groupby("task_id").size()
    assert counts.tolist() == [2] * 8


@pytest.mark.parametrize("lag", [0, 2])
def test_steps_of_a_row_lie_within_its_iteration(lag, tmp_path):
    # Poles fall when they do, so that no two shards and no two iterations make as many steps.
    meta = META | {"env_steps": 2000, "max_policy_lag": lag}
    maml = {"type": "maml", "episodes_per_task": 4, "epochs": 1}
    folder = play(tmp_path / "run", POLES, maml, shards=2, meta=meta)
    made = rows(folder, "metrics", name="steps_per_s")["env_steps"].tolist()
    assert len(made) >= 3
    trained = rows(folder, split="train")
    for start, end, (_, episodes) in zip([0, *made], made, trained.groupby("trial"), strict=False):
        assert episodes["env_steps"].between(start + 1, end).all()
        assert episodes["env_steps"].max() == end
    special = {"type": "finetune", **START, "tasks": 1, "updates": 2}
    folder = play(tmp_path / "other", POLES, maml, special=special)
    assert rows(folder, stage="special")["env_steps"].is_monotonic_increasing


def test_fine_tuning_counts_every_step_that_its_environments_made(tmp_path):
    special = {"type": "finetune", **START, "tasks": 3, "updates": 2}
    folder = play(tmp_path / "run", POLES, {"type": "ppo", "num_steps": 4}, special=special)
    done = rows(folder, "events", event="job_finished", stage="special")
    assert [json.loads(detail)["env_steps"] for detail in done["detail"]] == [3 * 4 * 8] * 3


def test_an_evaluation_steps_no_longer_than_its_episodes_last(tmp_path):
    lazy = {"type": "tests.matrix_family:LazyWalk"}
    folder = play(tmp_path / "run", lazy, {"type": "ppo", "num_steps": 4})
    LazyWalk.calls = 0
    asked = {"split": "test", "tasks": 3, "trials": 1, "checkpoint": "last"}
    frame = controller.evaluate(folder, stage=None, **asked)
    assert frame["length"].tolist() == [LIMIT] * 6
    assert LazyWalk.calls == 2 * LIMIT


@pytest.mark.parametrize("kind", ["rl2", "maml"])
def test_where_length_is_return_the_mean_of_counted_returns_is_the_true_mean(kind, tmp_path):
    # Half the episodes have 3 steps, on average over tasks, and half have 10: 6.5, each of a
    # standard deviation of 3.5. With the tasks that are drawn, 4096 of them: 0.08.
    algorithm = {"rl2": {"type": "rl2"}, "maml": {"type": "maml", "episodes_per_task": 2}}[kind]
    tasks = {**WALK, "varying": True, "drawn": True}
    network = {"rl2": GRU, "maml": MLP}[kind]
    folder = play(tmp_path / "run", tasks, algorithm | {"epochs": 1}, network, columns=2048)
    returns = rows(folder, split="train")["return"]
    assert len(returns) == 4096
    assert returns.mean() == pytest.approx((SHORT + LIMIT) / 2, abs=0.3)


def test_advantages_do_not_depend_on_where_a_rollout_was_cut():
    # Episodes have 300 steps, and the first rollout of a trial of two of them has 500: the same
    # hundred steps of both episodes are the last hundred of it, and 300 steps before.
    settings = {"episodes_per_task": 64, "gae_lambda": 0.9, "steps_per_adaptation": 500}
    spec = JobSpec(
        *("stage", "stage", 0),
        Component.model_validate({"type": "tests.matrix_family:NoisyWalk"}),
        Component.model_validate(MLP),
        Component.model_validate({"type": "maml", **settings}),
        RolloutSettings(shards=1, num_envs=64),
    )
    weights = Weights(0, Learner(spec).weights())
    _, trial, _ = RolloutWorker().collect(CollectCall(spec, 0, 0, 0), weights, {})
    advantage = trial[0].advantage
    first, second = advantage[100:200].mean(), advantage[400:500].mean()
    assert abs(first - second) < 0.25


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "stepwise_pearl", "belief_steps": 3, "gradient_steps": 1},
        {"type": "maml", "episodes_per_task": 1, "steps_per_adaptation": 3},
    ],
    ids=lambda algorithm: algorithm["type"],
)
def test_adaptation_steps_of_a_task_are_those_that_its_own_steps_led_to(algorithm, tmp_path):
    # Five tasks side by side, whose episodes have 3 or 10 steps: who plays the longer ones adapts
    # more often. With beliefs every episode ends in a step of its own.
    tasks = {**WALK, "varying": True, "drawn": True, "episodes": 3}
    held_out = {"type": "evaluate", **START, "tasks": 5, "record": True}
    folder = play(tmp_path / "run", tasks, algorithm, held_out=held_out)
    steps = rows(folder, "transitions", stage="held_out").sort_values(
        ["environment", "episode", "t"]
    )
    lengths = steps.groupby(["environment", "episode"]).size().unstack()
    assert lengths.sum(axis=1).nunique() > 1
    pieces = np.ceil(lengths / 3) if algorithm["type"] == "stepwise_pearl" else lengths / 3
    before = pieces.cumsum(axis=1) - pieces
    begun = [before.loc[key] for key in zip(steps["environment"], steps["episode"], strict=True)]
    np.testing.assert_array_equal(steps["adaptation_step"], np.floor(begun + steps["t"] / 3 + 1e-9))
    told = rows(folder, stage="held_out").sort_values(["task_id", "episode"])
    first = steps[steps["t"] == 0].sort_values(["task_id", "episode"])
    assert told["adaptation_step"].tolist() == first["adaptation_step"].tolist()


@pytest.mark.parametrize(
    ("kind", "score"), [("maml", 5.0), ("pearl", 5.0), ("ppo", 3.25), ("rl2", 3.25)]
)
def test_models_are_chosen_by_what_all_environments_come_to_not_by_the_longest_lived(kind, score):
    # Two environments, whose second episodes return 4 and 6; one of them went on for longer.
    played = {
        "episode": np.array([0, 0, 1, 1]),
        "adaptation_step": np.array([0, 0, 1, 3]),
        "return": np.array([1.0, 2.0, 4.0, 6.0]),
    }
    parts = (Component.model_validate(part) for part in (WALK, MLP, {"type": kind}))
    spec = JobSpec("stage", "stage", 0, *parts, RolloutSettings(num_envs=20))
    assert Validation([], "return", build(spec)).value(played) == score


def test_episodes_name_the_version_that_acted(tmp_path):
    special = {"type": "finetune", **START, "tasks": 2, "updates": 3}
    held_out = {"type": "evaluate", **START, "tasks": 2}
    folder = play(
        tmp_path / "run",
        WALK,
        {"type": "ppo", "num_steps": LIMIT},
        special=special,
        held_out=held_out,
    )
    finetuned = rows(folder, stage="special")
    assert sorted(finetuned["policy_version"].unique()) == [0, 1, 2, 3]
    assert set(rows(folder, stage="held_out")["policy_version"]) == {1}


def test_every_task_that_an_episode_names_is_in_the_tasks_table(tmp_path):
    folder = play(tmp_path / "run", WALK, {"type": "ppo", "num_steps": 2 * LIMIT})
    assert set(rows(folder)["task_id"]) <= set(rows(folder, "tasks")["task_id"])


def test_one_who_is_told_of_changes_meets_each_task_as_in_an_evaluation(tmp_path):
    sizes = {"streams": 2, "tasks_per_stream": 3, "episodes_per_task": 2}
    stream = {"type": "adapt", **START, **sizes, "change": "told", "by": "own"}
    held_out = {"type": "evaluate", **START, "tasks": 6}
    tasks = {**WALK, "acts": "continuous"}  # what a memory holds shows in every action
    folder = play(tmp_path / "run", tasks, {"type": "rl2"}, GRU, stream=stream, held_out=held_out)
    told, alone = (
        rows(folder, stage=stage, job=stage).sort_values(["task_id", "episode"])
        for stage in ("stream", "held_out")
    )
    assert len(told) == 12
    for name in ("task_id", "return", "length"):
        np.testing.assert_array_equal(told[name], alone[name])


@pytest.mark.parametrize(
    ("tasks", "copies", "episodes", "size"),
    [
        # Stepped one by one: 32 columns, of at most 16,384 steps together.
        ({"type": "gym", "id": "CartPole-v1", "max_episode_steps": 10}, 1, 1, 32),
        ({"type": "gym", "id": "CartPole-v1", "max_episode_steps": 1_000}, 1, 1, 16),
        ({"type": "gym", "id": "CartPole-v1", "max_episode_steps": 1_000}, 1, 4, 4),
        ({"type": "gym", "id": "CartPole-v1", "max_episode_steps": 100}, 8, 1, 4),
        ({"type": "gym", "id": "CartPole-v1", "max_episode_steps": 1_000_000}, 1, 1, 1),
        ({"type": "bandit", "arms": 5, "pulls": 10}, 1, 1, 1024),
        # 100,000 steps of a number of 4 bytes: 671 of them fill 256 MiB.
        ({"type": "bandit", "arms": 5, "pulls": 100_000}, 1, 1, 671),
    ],
)
def test_an_evaluation_is_played_in_calls_of_bounded_memory_and_seconds(
    tasks, copies, episodes, size
):
    assert tasks_at_once(load_family(Component(**tasks)), copies, episodes) == size
