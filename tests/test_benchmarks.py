"""The figures that benchmarks report, by hand."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from benchmarks.learning.figures import cost, returns, sources, write_episodes
from benchmarks.learning.table import COLUMNS, RESULTS, interval, number, table
from dmrl_ray.config.loading import parse_config
from dmrl_ray.results.intervals import t_interval
from dmrl_ray.results.reading import adaptation
from dmrl_ray.store.writer import RunWriter


def episodes(*rows):
    names = ["seed", "job", "task_id", "trial", "adaptation_step", "return"]
    return pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).assign(score=0.5)


def test_a_trial_is_worth_the_sum_of_its_steps():
    # Task a: 1 + 3, task b: 2 + 6.
    rows = [(0, "s", "a", 0, 0, 1), (0, "s", "a", 0, 1, 3)]
    rows += [(0, "s", "b", 0, 0, 2), (0, "s", "b", 0, 1, 6)]
    figures = returns(episodes(*rows), whole=True)
    assert (figures["mean"], figures["tasks"]) == (6, 2)
    assert figures["per_step"] == {0: 1.5, 1: 4.5}


def test_else_the_last_step_alone_counts():
    rows = [(0, "s", "a", 0, step, value) for step, value in enumerate((1, 3, 7))]
    assert returns(episodes(*rows), whole=False)["mean"] == 7


def test_a_task_sampled_twice_counts_twice():
    # Two columns a draw: a was drawn once, b twice, so (1 + 4 + 4) / 3.
    rows = [(0, "s", "a", 0, 0, value) for value in (0, 2)]
    rows += [(0, "s", "b", 0, 0, value) for value in (3, 5, 4, 4)]
    figures = returns(episodes(*rows), whole=False)
    assert (figures["mean"], figures["tasks"]) == (3, 3)


def test_a_job_of_fine_tuning_counts_once_however_many_episodes_it_plays():
    rows = [(0, "j0", "a", 0, 1, 2)] * 5 + [(0, "j1", "b", 0, 1, 6)] * 5
    rows += [(0, "j2", "b", 0, 1, 7)] * 5
    figures = returns(episodes(*rows), whole=False)
    assert (figures["mean"], figures["tasks"]) == (5, 3)


def test_a_benchmark_and_the_report_have_one_mean_and_interval():
    rows = [(s, "s", t, 0, 0, s + ord(t) % 7) for s in (0, 1) for t in "aaabbcde"]
    frame = episodes(*rows).assign(stage="s", split="test", algorithm="ppo", success=None)
    figures = returns(frame, whole=False)
    reported = adaptation(frame).set_index("measure").loc["return"]
    found = [figures[name] for name in ("mean", "low", "high", "tasks")]
    expected = [reported[name] for name in ("mean", "low", "high", "starts")]
    assert found == pytest.approx(expected, abs=1e-4)


def test_every_seed_counts_the_same():
    rows = episodes((0, "s", "a", 0, 0, 1), (1, "s", "b", 0, 0, 4), (1, "s", "c", 0, 0, 6))
    figures = returns(rows, whole=False)
    assert figures["per_seed"] == [1, 5]
    assert figures["mean"] == 3


def test_seeds_on_many_tasks_are_as_uncertain_as_their_means():
    # Means 1, 2, 4 on tasks of their own: 7 / 3 +- 4.303 * 1.528 / sqrt(3).
    rows = [(s, "s", f"{s}-{t}", 0, 0, m) for s, m in enumerate((1, 2, 4)) for t in range(50)]
    figures = returns(episodes(*rows), whole=False)
    assert figures["low"] == pytest.approx(7 / 3 - 3.795, abs=1e-3)
    assert figures["high"] == pytest.approx(7 / 3 + 3.795, abs=1e-3)


def test_the_cost_of_training_includes_all_earlier_stages():
    text = """
tasks: bandit
stages:
  first: {type: pretrain, env_steps: 10}
  other: {type: pretrain, env_steps: 10}
  second: {type: pretrain, init_from: first, env_steps: 10}
  held_out: {type: evaluate, init_from: second}
"""
    chain = list(sources(parse_config(text, "text"), "held_out"))
    assert chain == ["second", "first"]
    rows = [("r0", "first", 10, 1), ("r0", "second", 20, 2), ("r0", "other", 99, 9)]
    rows += [("r1", "first", 12, 3), ("r1", "second", 20, 4)]
    events = pd.DataFrame(
        [
            {"run_id": run, "stage": stage, "event": "job_finished", "detail": detail}
            for run, stage, steps, seconds in rows
            for detail in ['{"env_steps": %d, "seconds": %d}' % (steps, seconds)]  # noqa: UP031
        ]
    )
    assert cost(events, iter(chain)) == {"env_steps": 31, "seconds": [3, 7]}


def test_a_saved_result_is_a_line_of_the_table():
    stage = {"method": "rl2", "measure": "return of a trial", "tasks": 2000, "mean": 6.6041}
    stage |= {"low": 6.2, "high": 7.0, "per_seed": [6.635, 6.5732], "random": 5.0}
    stage |= {"env_steps": 10_000_000, "seconds": [231, 182]}
    stage |= {"score_per_step": {"0": 0.254, "1": float("nan")}}
    result = {"config": "bandit", "problem": "bandit", "seeds": [0, 1], "stages": {"held": stage}}
    result |= {"cpu": "Z80", "cores": 4, "workers": 0, "threads": 1, "commit": "a" * 40 + "+"}
    line = table([result]).splitlines()[-1]
    assert line.count(" | ") == len(COLUMNS) - 1
    for part in (
        "**6.604** [6.200, 7.000], n = 2",
        "6.635, 6.573",
        "| 5.000 | - | 0.25, - |",
        "182 to 231",
        "aaaaaaaaa+",
    ):
        assert part in line


def test_a_result_of_means_alone_has_students_t_on_them():
    # Mean 9, standard deviation 1: 9 +- 4.303 / sqrt(3).
    assert interval({"per_seed": [8.0, 9.0, 10.0]}) == "[6.516, 11.48], n = 3"
    assert interval({"per_seed": [8.0]}) == "n = 1"


def test_the_readme_gives_the_intervals_of_the_results():
    text = (RESULTS.parent.parent / "README.md").read_text()
    lines = re.findall(r"^\| `(\w+)`.*?\[([\d.]+), ([\d.]+)\] (?=[^[]*$)", text, re.M)
    given = {name: (low, high) for name, low, high in lines if (RESULTS / f"{name}.json").is_file()}
    assert len(given) > 10
    for name in given.keys() - {"sparse_point_varibad"}:  # Its third episode, not its trial.
        stages = json.loads((RESULTS / f"{name}.json").read_text())["stages"]
        expected = t_interval(np.array(next(iter(stages.values()))["per_seed"]))
        digits = len(given[name][0].partition(".")[2])
        assert given[name] == tuple(f"{end:.{digits}f}" for end in expected), name


def test_the_return_of_every_episode_is_kept(tmp_path):
    text = """
tasks: bandit
stages:
  trained: {type: pretrain, env_steps: 10}
  held_out: {type: evaluate, init_from: trained}
"""
    where = {"job": "0", "algorithm": "ppo", "split": "test", "length": 10, "greedy": True}
    where |= dict.fromkeys(["trial", "episode", "policy_version", "env_steps"], 0)
    folders = [tmp_path / str(seed) for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        with RunWriter.create(folder, text, {}) as writer:
            for stage in ("trained", "held_out"):
                cells = {"task_id": ["a", "b"], "adaptation_step": [0, 1], "return": [0.5, 1.5]}
                writer.add("episodes", where | cells | {"stage": stage, "seed": seed})
            writer.commit({}, {})
    write_episodes(folders, tmp_path / "kept.parquet")
    kept = pd.read_parquet(tmp_path / "kept.parquet")
    assert kept["stage"].unique().tolist() == ["held_out"]
    assert kept["seed"].tolist() == [0, 0, 1, 1]
    assert kept["task_id"].tolist() == ["a", "b"] * 2
    assert kept["return"].tolist() == [0.5, 1.5] * 2


def test_numbers_have_four_digits_that_count():
    assert [number(x) for x in (78.66123, -0.50281, 500.0, None)] == [
        "78.66",
        "-0.5028",
        "500.0",
        "-",
    ]
