"""Every step that is recorded is the one that was played."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.jobs.spec import build
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load
from dmrl_ray.rollout.rows import transition_rows
from dmrl_ray.store.writer import RunWriter
from dmrl_ray.types import random_stream
from tests.jobs.test_worker import RECURRENT, SPECS, make_spec, weights
from tests.matrix_family import LIMIT, Walk

CONFIG = """
name: recorded
tasks: {type: cartpole}
network: {encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 30, epochs: 1}
rollout: {shards: 2, num_envs: 4}
workers: {num: 0}
learners: {threads: 1}
stages:
  train: {type: pretrain, env_steps: 480, validation_tasks: 2, record: true}
  special: {type: finetune, init_from: train, tasks: 2, updates: 2, record: true}
  held_out: {type: evaluate, init_from: train, tasks: 3, trials: 2, record: true}
"""


def play(folder, *settings):
    controller.run(parse_config(CONFIG, "c.yaml", list(settings)), folder, display=Display(quiet=1))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return play(tmp_path_factory.mktemp("recorded") / "run")


def make_record(spec):
    return replace(spec, record=True)


def recorded(spec, iterations=1):
    """Rows and trials of a shard, as a worker collects them."""
    worker, state, answers = RolloutWorker(), {}, []
    for i in range(iterations):
        call = CollectCall(spec, 1, i, 0)
        report, trial, state = worker.collect(call, weights(spec, i), state)
        answers.append((report.steps, trial))
    return answers


def vectors(cells):
    return np.array(cells.to_pylist())


@pytest.mark.parametrize("name", SPECS)
def test_rows_hold_what_was_played_column_after_column(name):
    (steps, trial), *_ = recorded(make_record(SPECS[name]))
    obs = np.concatenate([r.obs[:-1] for r in trial])
    for b in range(trial[0].num_envs):
        mine = steps["environment"] == trial[0].num_envs + b  # of the second shard
        for field in ("action", "reward", "terminated", "truncated", "log_prob"):
            cells = steps[field] if isinstance(steps[field], np.ndarray) else vectors(steps[field])
            played = np.concatenate([getattr(r, field)[:, b] for r in trial])
            np.testing.assert_array_equal(cells[mine], played)
        np.testing.assert_array_equal(vectors(steps["obs"])[mine], obs[:, b])


@pytest.mark.parametrize("name", SPECS)
def test_a_reader_finds_every_true_successor(name):
    (steps, trial), *_ = recorded(make_record(SPECS[name]))
    obs, given = steps["obs"].to_pylist(), steps["next_obs"].to_pylist()
    found = [given[i] or obs[i + 1] for i in range(len(obs))]
    truth = np.concatenate([r.next_obs() for r in trial]).swapaxes(0, 1)
    np.testing.assert_array_equal(np.array(found), truth.reshape(len(obs), -1))


def test_episodes_that_go_on_are_counted_on():
    # CartPole under a random policy outlives 20 steps, and then falls.
    answers = recorded(make_record(SPECS["ppo"]), iterations=6)
    for b in range(4):
        t, episode, done = (
            np.concatenate([steps[k][steps["environment"] == 4 + b] for steps, _ in answers])
            for k in ("t", "episode", "terminated")
        )
        ends = np.flatnonzero(done)
        assert len(ends) > 1
        assert (t.max() >= 20) or len(ends) > 3
        np.testing.assert_array_equal(episode, np.concatenate([[0], done[:-1].cumsum()]))
        starts = np.concatenate([[0], ends[:-1] + 1])
        np.testing.assert_array_equal(t[ends], ends - starts)


def test_a_row_names_the_task_that_was_played_not_the_one_that_waits():
    spec = make_record(SPECS["ppo"])
    worker, state = RolloutWorker(), {}
    names = {}
    for i in range(4):
        call = CollectCall(spec, 0, i, 0)
        report, _, state = worker.collect(call, weights(spec, i), state)
        rows = zip(
            report.steps["environment"],
            report.steps["episode"],
            report.steps["task_id"].to_pylist(),
            strict=True,
        )
        for column, episode, task in rows:  # one task for each episode, over all iterations
            assert names.setdefault((column, episode), task) == task
    assert len(set(names.values())) > 4


def test_memory_counts_shots_in_episodes():
    spec = make_spec({"type": "tabular_mdp", "episodes": 2}, {"type": "rl2"}, RECURRENT)
    (steps, _), *_ = recorded(make_record(spec))
    np.testing.assert_array_equal(steps["adaptation_step"], steps["episode"])
    assert set(steps["adaptation_step"]) == {0, 1}


def test_recording_changes_no_result(run, tmp_path):
    off = [f"stages.{name}.record=false" for name in ("train", "special", "held_out")]
    plain = play(tmp_path / "plain", *off)
    kept = ["stage", "task_id", "trial", "episode", "return", "length"]
    assert load(plain)[kept].equals(load(run)[kept])
    assert not list((plain / "transitions").iterdir())


def test_the_steps_of_a_run_add_up_to_its_episodes(run):
    steps, episodes = load(run, table="transitions"), load(run)
    episodes = episodes[episodes["split"] != "validation"]
    key = ["stage", "job", "task_id"]
    ended = steps["terminated"] | steps["truncated"]
    counts = steps[ended & (steps["stage"] != "held_out")].groupby(key).size()
    assert counts.equals(episodes[episodes["stage"] != "held_out"].groupby(key).size())
    first = steps[(steps["stage"] == "held_out") & (steps["episode"] == 0)]
    returns = first.groupby(["trial", "environment"])["reward"].sum()
    held_out = episodes[episodes["stage"] == "held_out"]["return"]
    assert sorted(returns) == sorted(held_out)


def test_the_table_is_read_with_its_vectors(run):
    steps = load(run, table="transitions")
    assert set(steps["stage"]) == {"train", "special", "held_out"}
    assert steps["obs"].iloc[0].shape == (4,)
    assert steps["action"].dtype == np.int64
    # A learning history: one column of one job, in order of learning.
    job = steps[steps["stage"] == "special"].groupby(["job", "environment"])
    for _, rows in job:
        assert rows["adaptation_step"].is_monotonic_increasing
        assert (rows["t"].diff().iloc[1:].isin([1]) | (rows["t"].iloc[1:] == 0)).all()


def steps_of(first, rows=100, width=1000):
    """Rows whose trial counts up from `first`, as another writes them."""
    (steps, _), *_ = recorded(make_record(SPECS["ppo"]))
    many = {k: v[:rows] for k, v in steps.items()}
    obs = pa.array(np.zeros((rows, width), np.float32).tolist(), pa.list_(pa.float32()))
    return {**many, "stage": "s", "job": "j", "obs": obs, "trial": np.arange(first, first + rows)}


def test_rows_spilled_before_their_commit_are_committed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dmrl_ray.store.writer.SPILL_BYTES", 300_000)  # less than two additions
    folder = tmp_path / "run"
    with RunWriter.create(folder, "seed: 0\n", {}) as writer:
        for n in range(4):
            writer.add("transitions", steps_of(20 * n, rows=20, width=10_000))
        assert len(list((folder / "transitions").glob("_part*"))) >= 2
        assert len(load(folder, "transitions")) == 0
        writer.commit({}, {})
        assert load(folder, "transitions")["trial"].tolist() == list(range(80))
        writer.add("transitions", steps_of(100, rows=20, width=20_000))
        writer.discard()
        writer.commit({}, {})
    assert len(load(folder, "transitions")) == 80
    assert not list((folder / "transitions").glob("_*"))


def test_rows_spilled_within_one_commit_are_read_in_the_order_they_came(tmp_path, monkeypatch):
    monkeypatch.setattr("dmrl_ray.store.writer.SPILL_BYTES", 1)
    with RunWriter.create(tmp_path / "run", "seed: 0\n", {}) as writer:
        for n in range(12):
            row = {"stage": "s", "job": "j", "policy_version": n, "env_steps": n}
            writer.add("metrics", row | {"name": "loss", "value": float(n)})
        writer.commit({}, {})
    assert load(tmp_path / "run", "metrics")["value"].tolist() == list(range(12))


def test_rows_spilled_by_a_killed_writer_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("dmrl_ray.store.writer.SPILL_BYTES", 1)
    folder = tmp_path / "run"
    with RunWriter.create(folder, "seed: 0\n", {}) as writer:
        writer.commit({}, {})
        writer.add("transitions", steps_of(0, rows=5))
    with RunWriter.open(folder) as writer:
        assert not list((folder / "transitions").iterdir())
        writer.add("transitions", steps_of(7, rows=5))
        writer.commit({}, {})
    assert load(folder, "transitions")["trial"].tolist() == list(range(7, 12))


def test_long_rows_are_read_back_in_small_groups(tmp_path):
    with RunWriter.create(tmp_path / "run", "seed: 0\n", {}) as writer:
        writer.add("transitions", steps_of(0, rows=80, width=30_000))  # 9.6 MB
        writer.commit({}, {})
    (part,) = (tmp_path / "run" / "transitions").iterdir()
    assert 8 <= pq.ParquetFile(part).num_row_groups <= 16


def test_a_collection_from_its_middle_is_recorded_without_the_sampler():
    # The function sees rollouts alone, so that a recorded job can be made again from them.
    spec = SPECS["rl2"]
    program = build(spec)
    sampler = program.sampler(4)
    sampler.start(random_stream(0), 3)
    tasks = program.distribution.sample(np.random.default_rng(0), 2, "train")
    trial = program.algorithm.collect(sampler, tasks)
    rows = transition_rows(
        trial, tasks, number=5, first_env=8, open_before=None, step_is_episode=True
    )
    assert set(rows["policy_version"]) == {3}
    assert rows["task_id"].to_pylist()[0] == tasks[0].id
    assert rows["task_id"].to_pylist()[-1] == tasks[1].id
    assert set(rows["environment"]) == {8, 9, 10, 11}


class Told(Walk):
    """A walk of ten steps whose every reward is its task's goal."""

    family = "told"

    def make_vec(self, num_envs):
        env = super().make_vec(num_envs)
        step = env.step

        def told(actions):
            goal = env.goal.astype(np.float32)
            obs, _, *rest = step(actions)
            return obs, goal, *rest

        env.step = told
        return env


@pytest.mark.parametrize("algorithm", ["ppo", "impala", "sac"])
def test_a_row_names_its_task_where_episodes_end_with_the_collection(algorithm):
    settings = {"type": algorithm, "num_steps": LIMIT}
    spec = make_spec({"type": "tests.rollout.test_recording:Told"}, settings, record=True)
    worker, state, goals = RolloutWorker(), {}, {}
    for i in range(4):
        report, _, state = worker.collect(CollectCall(spec, 0, i, 0), weights(spec, i), state)
        names, values = (report.tasks[name].to_pylist() for name in ("task_id", "param.goal"))
        goals |= dict(zip(names, values, strict=True))
        played = sorted(
            zip(report.steps["task_id"].to_pylist(), report.steps["reward"], strict=True)
        )
        assert len(played) == 4 * LIMIT
        for task, reward in played:
            assert reward == np.float32(goals[task])
        returns = {task: reward * LIMIT for task, reward in played}
        for task, total in zip(report.episodes["task_id"], report.episodes["return"], strict=True):
            assert returns[task] == pytest.approx(total, rel=1e-5)
