"""The figures that benchmarks report, by hand."""

import pandas as pd
import pytest

from benchmarks.learning.figures import cost, returns, sources
from benchmarks.learning.table import COLUMNS, number, table
from dmrl_ray.yaml_config import parse_config


def episodes(*rows):
    names = ["run_id", "job", "task_id", "trial", "adaptation_step", "return"]
    return pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).assign(score=0.5)


def test_a_trial_is_worth_the_sum_of_its_shots():
    # Task a: 1 + 3, task b: 2 + 6; the mean is 6, errors are 2, so 1.96 * 2 / sqrt(2).
    rows = episodes(*(("r", "s", *x) for x in [("a", 0, 0, 1), ("a", 0, 1, 3)]))
    rows = pd.concat([rows, episodes(("r", "s", "b", 0, 0, 2), ("r", "s", "b", 0, 1, 6))])
    figures = returns(rows, 1, whole=True)
    assert (figures["mean"], figures["tasks"]) == (6, 2)
    assert figures["interval"] == pytest.approx(1.96 * 2**0.5, abs=1e-4)
    assert figures["per_shot"] == {0: 1.5, 1: 4.5}


def test_else_the_last_shot_alone_counts():
    rows = episodes(("r", "s", "a", 0, 0, 1), ("r", "s", "a", 0, 1, 3), ("r", "s", "a", 0, 2, 7))
    assert returns(rows, 1, whole=False)["mean"] == 7


def test_a_task_drawn_twice_counts_twice():
    # Two columns a draw: a was drawn once, b twice, so (1 + 4 + 4) / 3.
    rows = [("r", "s", "a", 0, 0, value) for value in (0, 2)]
    rows += [("r", "s", "b", 0, 0, value) for value in (3, 5, 4, 4)]
    figures = returns(episodes(*rows), 2, whole=False)
    assert (figures["mean"], figures["tasks"]) == (3, 3)


def test_draws_of_one_task_differ_by_chance_too():
    # One task of two draws that earned 1 and 5: errors are 2.
    figures = returns(episodes(*[("r", "s", "a", 0, 0, value) for value in (1, 5)]), 1, whole=True)
    assert figures["interval"] == pytest.approx(1.96 * 2**0.5, abs=1e-4)


def test_a_job_of_fine_tuning_counts_once_whatever_its_episodes():
    rows = [("r", "j0", "a", 0, 1, 2)] + [("r", "j1", "b", 0, 1, 6)] * 5
    figures = returns(episodes(*rows), None, whole=False)
    assert (figures["mean"], figures["tasks"]) == (4, 2)


def test_every_seed_counts_the_same():
    rows = episodes(("r0", "s", "a", 0, 0, 1), ("r1", "s", "a", 0, 0, 4), ("r1", "s", "b", 0, 0, 6))
    figures = returns(rows, 1, whole=False)
    assert figures["per_seed"] == [1, 5]
    assert figures["mean"] == 3


def test_training_costs_what_all_stages_before_it_cost():
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
    stage |= {"interval": 0.018, "per_seed": [6.635, 6.5732], "random": 5.0}
    stage |= {"env_steps": 10_000_000, "seconds": [231, 182]}
    stage |= {"score_per_shot": {"0": 0.254, "1": float("nan")}}
    result = {"config": "bandit", "problem": "bandit", "seeds": [0, 1], "stages": {"held": stage}}
    result |= {"cpu": "Z80", "cores": 4, "workers": 0, "threads": 1, "commit": "a" * 40 + "+"}
    line = table([result]).splitlines()[-1]
    assert line.count(" | ") == len(COLUMNS) - 1
    for part in (
        "**6.604** ± 0.01800",
        "6.635, 6.573",
        "| 5.000 | - | 0.25, - |",
        "182 to 231",
        "aaaaaaaaa+",
    ):
        assert part in line


def test_numbers_have_four_digits_that_count():
    assert [number(x) for x in (78.66123, -0.50281, 500.0, None)] == [
        "78.66",
        "-0.5028",
        "500.0",
        "-",
    ]
