"""The report: what it says about a run that is written by hand."""

import itertools
import json
import math
import re

import pandas as pd
import pytest

from dmrl_ray.config.components import SHORT_NAMES
from dmrl_ray.results.reading import load
from dmrl_ray.results.report import evaluation_report, families_report, next_steps, text_report
from dmrl_ray.store.writer import RunWriter

CONFIG = """\
name: hand
seed: 7
tasks: {type: bandit}
algorithm: {type: rl2}
stages:
  meta: {type: pretrain, env_steps: 1000}
  tune: {type: finetune, init_from: meta, split: test}
  stream: {type: adapt, init_from: meta}
  final: {type: evaluate, init_from: meta, split: test}
"""
START = 1_700_000_000.0


def episode(stage: str, split: str, task: int, step: int, score: float, **more) -> dict:
    row = {"stage": stage, "job": "0", "algorithm": "rl2", "task_id": f"{split}-{task}"}
    counts = {"seed": 7, "trial": 0, "episode": step, "adaptation_step": step, "policy_version": 3}
    figures = {"return": 10.0 * (step + 1), "length": 5, "score": score, "success": None}
    figures |= {"env_steps": 0, "split": split, "time": START}
    return row | counts | figures | experience(step) | more


def experience(episodes: float, *, greedy: bool | None = True) -> dict:
    """What an episode of 5 steps has behind it after so many of the same length."""
    counts = {"experience_episodes": episodes, "experience_steps": 5 * episodes}
    return counts | {"greedy": greedy}


def metric(stage: str, name: str, value: float, steps: int, version: int, time: float) -> dict:
    row = {"stage": stage, "job": "0", "policy_version": version, "env_steps": steps}
    return row | {"name": name, "value": value, "time": START + time}


def event(name: str, detail: str = "{}") -> dict:
    return {"stage": "meta", "job": "0", "event": name, "detail": detail, "time": START}


def run_of(folder, config: str = CONFIG, **tables: list[dict]):
    """A committed run with these rows."""
    with RunWriter.create(folder / "hand", config, {"host": {"cpus": 4}}) as writer:
        for table, rows in tables.items():
            for row in rows:
                writer.add(table, {key: [value] for key, value in row.items()})
        writer.commit({}, {})
    return folder / "hand"


def cells(report: str, first: str, under: str = "") -> list[str]:
    """The cells of the row that begins with a word, in the table under a heading."""
    for block in report.split("\n\n"):
        if block.startswith(under):
            for line in block.splitlines():
                if re.match(rf"\| {first} ", line):
                    return [cell.strip() for cell in line.strip("|").split("|")]
    raise AssertionError(f"no row of {first!r} under {under!r} in\n{report}")


def test_each_point_of_experience_is_a_row_of_its_mean_and_interval():
    # Two tasks: 0.2 and 0.4 before adaptation, 0.7 and 0.9 after 20 episodes of 5 steps; means 0.3
    # and 0.8, errors 0.1, and Student's t of one degree of freedom is 12.706.
    scores = {(0, 0): 0.2, (1, 0): 0.4, (0, 1): 0.7, (1, 1): 0.9}
    rows = [
        episode("final", "test", task, step, score) | experience(20 * step)
        for (task, step), score in scores.items()
    ]
    report = evaluation_report(pd.DataFrame(rows))
    assert cells(report, "stage") == [
        *("stage", "episodes", "steps", "return [95 %]", "score [95 %]"),
    ]
    first, second = ["0", "0", "10.00 [?]"], ["20", "100", "20.00 [?]"]  # All the same.
    assert cells(report, "final") == ["final", *first, "0.30 [-0.97, 1.57]"]
    assert cells(report, "rl2, greedy") == ["rl2, greedy", *second, "0.80 [-0.47, 2.07]"]
    assert cells(report, "2 test tasks") == ["2 test tasks", "", "", "", ""]
    assert "Intervals are over tasks. [?]: too few episodes for an interval. Score" in report


def test_returns_stand_alone_where_no_score_is_known():
    rows = [episode("final", "test", task, 0, math.nan) | experience(0) for task in (0, 1)]
    report = evaluation_report(pd.DataFrame(rows))
    assert cells(report, "stage") == ["stage", "episodes", "steps", "return [95 %]"]
    assert "oracle" not in report


def test_success_is_shown_with_its_exact_interval():
    rows = [
        episode("final", "test", task, 0, 0.5, success=True) | experience(0) for task in range(16)
    ]
    report = evaluation_report(pd.DataFrame(rows))
    assert cells(report, "final")[-1] == "1.00 [0.79, 1.00]"


def test_fewer_than_five_seeds_are_marked():
    rows = [
        episode("final", "test", task, 0, 0.1 * seed, seed=seed) | experience(0)
        for task, seed in itertools.product(range(4), range(5))
    ]
    frame = pd.DataFrame(rows)
    few, enough = evaluation_report(frame[frame["seed"] < 3]), evaluation_report(frame)
    assert cells(few, r"\(3 seeds\)")[0] == "(3 seeds)"
    # Seeds 0, 0.1, 0.2: 0.1 +- 4.303 * 0.1 / sqrt(3).
    assert cells(few, "final")[-1] == "0.10 [-0.15, 0.35]"
    assert cells(enough, "5 seeds")[0] == "5 seeds"
    assert "Intervals are over training seeds." in few


def test_methods_that_ask_for_other_experience_do_not_share_a_row():
    rows = [episode("final", "test", 0, step, 0.5) | experience(step) for step in (0, 1)]
    rows += [
        episode("meta", "test", 0, step, 0.5, algorithm="maml")
        | experience(20 * step, greedy=False)
        for step in (0, 1)
    ]
    report = evaluation_report(pd.DataFrame(rows))
    assert cells(report, "rl2, greedy")[1:3] == ["1", "5"]
    assert cells(report, "maml, sampled")[1:3] == ["20", "100"]


def test_how_actions_were_chosen_is_not_guessed():
    row = episode("final", "test", 0, 0, 0.5) | experience(0, greedy=None)
    report = evaluation_report(pd.DataFrame([row]).astype({"greedy": "boolean"}))
    assert cells(report, "rl2")[0] == "rl2"
    assert "greedy" not in report
    assert "sampled" not in report


def test_unknown_experience_is_a_question_mark():
    row = episode("final", "test", 0, 0, 0.5) | experience(math.nan)
    assert cells(evaluation_report(pd.DataFrame([row])), "final")[1:3] == ["?", "?"]


def test_training_and_validation_episodes_are_not_results(tmp_path):
    splits = ("train", "validation", "test")
    rows = [
        episode("tune", split, 0, 0, score)
        for split, score in zip(splits, (0, 0.5, 1), strict=True)
    ]
    rows += [episode("meta", "train", 0, 0, 0.1), episode("meta", "test", 0, 0, 0.1)]
    report = text_report(run_of(tmp_path, episodes=rows))
    assert cells(report, "tune", "Adaptation")[4] == "1.00 [?]"
    assert report.count("| tune ") == 2  # Under adaptation and under training.
    with pytest.raises(AssertionError):
        cells(report, "meta", "Adaptation")


def test_many_points_keep_the_first_and_the_last():
    rows = [episode("final", "test", 0, step, 0.5) | experience(step) for step in range(12)]
    lines = evaluation_report(pd.DataFrame(rows)).splitlines()
    points = [line.split("|")[2].strip() for line in lines if line.startswith("| ")]
    assert points == ["episodes", "0", "2", "4", "7", "9", "11"]
    assert "Shown are 6 of 12 points" in lines[-1]


def test_a_mean_over_fewer_tasks_shows_their_number():
    rows = [
        episode("final", "test", task, 0, 0.1 * task if task < 5 else math.nan)
        for task in range(10)
    ]
    line = cells(evaluation_report(pd.DataFrame(rows)), "final")
    assert line[-1].endswith("] (5 tasks)")
    assert "tasks" not in line[-2]


def test_draws_of_few_tasks_are_counted_as_starts():
    # Returns 10 and 11 of task 0, drawn seven times, and of task 1, drawn three times.
    rows = [
        episode("final", "test", int(n >= 7), 0, 0.5, **{"return": 10.0 + n % 2}) for n in range(10)
    ]
    report = evaluation_report(pd.DataFrame(rows))
    assert cells(report, "10 starts of 2 test tasks")
    assert "Intervals are over starts" in report
    low, high = re.search(r"10.50 \[(\S+), (\S+)\]", report).groups()
    assert float(low) > 10
    assert float(high) < 11


def test_stages_that_play_training_tasks_are_not_held_out(tmp_path):
    config = CONFIG + "  played: {type: evaluate, init_from: meta, split: train}\n"
    rows = [episode("played", "train", task, 0, 0.5) for task in range(4)]
    report = text_report(run_of(tmp_path, config, episodes=rows))
    assert "Adaptation on held-out" not in report
    assert cells(report, "4 train tasks", "Adaptation on training tasks")


def test_regret_is_averaged_over_windows_of_steps_for_each_agent(tmp_path):
    # 12 steps in 3 windows of four; regret of step u is 13 - u, and one less in the first task.
    rows = [
        metric("stream", name + end, 13 - u - first + off, u, 0, 0) | {"job": job}
        for job in ("stream", "stream.restarted")
        for name, first in (("regret_first", 1), ("regret_since_change", 0))
        for end, off in (("", 0), ("_low", -0.5), ("_high", 0.5))
        for u in range(1, 13)
    ]
    report = text_report(run_of(tmp_path, metrics=rows))
    lines = [
        [c.strip() for c in x.split("|")[1:-1]] for x in report.splitlines() if "| stream" in x
    ]
    later = ["10.5 [10, 11]", "6.5 [6, 7]", "2.5 [2, 3]"]
    first = ["9.5 [9, 10]", "5.5 [5, 6]", "1.5 [1, 2]"]
    assert "| 1-4 " in report
    assert lines == [
        ["stream", "continuing", "first", *first],
        ["stream", "continuing", "later", *later],
        ["stream", "restarted", "first", *first],
        ["stream", "restarted", "later", *later],
    ]


def test_steps_that_are_the_same_in_all_streams_leave_the_mean_in_its_interval(tmp_path):
    # Steps 1 and 2 are 0 in every stream and have no interval; step 3 is 3 +- 1.5.
    ends = [("", 0.0), ("_low", math.nan), ("_high", math.nan)]
    rows = [metric("stream", "regret_first" + end, x, u, 0, 0) for u in (1, 2) for end, x in ends]
    rows += [
        metric("stream", "regret_first" + end, 3.0 + off, u, 0, 0)
        for u in (3, 4, 5, 6)
        for end, off in (("", 0), ("_low", -1.5), ("_high", 1.5))
    ]
    rows += [
        metric("stream", "regret_first" + end, x, u, 0, 0)
        for u in (7, 8, 9)
        for end, x in (("", 1.0), ("_low", math.nan), ("_high", math.nan))
    ]
    found = cells(text_report(run_of(tmp_path, metrics=rows)), "stream", "Regret")
    assert found[3:] == ["1 [0.5, 1.5]", "3 [1.5, 4.5]", "1 [?]"]


def test_each_online_stage_has_windows_of_its_own_length(tmp_path):
    config = CONFIG + "  short: {type: adapt, init_from: meta}\n"
    rows = [
        metric(stage, "regret_first", 1.0, u, 0, 0)
        for stage, steps in (("stream", 12), ("short", 3))
        for u in range(1, steps + 1)
    ]
    report = text_report(run_of(tmp_path, config, metrics=rows))
    assert cells(report, "stage", "Regret per step of stream")[3:] == ["1-4", "5-8", "9-12"]
    assert cells(report, "stage", "Regret per step of short")[3:] == ["1", "2", "3"]


def test_streams_without_an_oracle_show_returns_by_episodes_since_the_change(tmp_path):
    # Three streams of two tasks; both copies of a stream count once: its mean is 10 n + episode.
    rows = [
        episode("stream", "test", 2 * n + k, e, 0.0)
        | {"job": "stream", "trial": n, "change": k, "score": None}
        | {"return": 10.0 * (n + 1) + e + copy + 100 * k}
        for n, k, e, copy in itertools.product(range(3), range(2), range(3), (-1, 1))
    ]
    report = text_report(run_of(tmp_path, episodes=rows))
    lines = [
        [c.strip() for c in x.split("|")[3:-1]] for x in report.splitlines() if "| stream" in x
    ]
    # Means 20, 21, 22; t(0.975, 2) = 4.303 times 10 / sqrt(3) is 24.84.
    spread = ["20.00 [-4.841, 44.84]", "21.00 [-3.841, 45.84]", "22.00 [-2.841, 46.84]"]
    later = ["120.0 [95.16, 144.8]", "121.0 [96.16, 145.8]", "122.0 [97.16, 146.8]"]
    assert "tasks | 0 " in report
    assert lines == [["first", *spread], ["later", *later]]


def test_training_counts_steps_updates_speed_and_the_best_validation(tmp_path):
    rows = [
        metric("meta", "validation/score", 0.2, 500, 5, 0.0),
        metric("meta", "validation/score", 0.8, 1000, 10, 5.0),
        metric("meta", "validation/score", 0.7, 2000, 20, 10.0),
    ]
    report = text_report(run_of(tmp_path, metrics=rows))
    # 2000 steps in 10 s.
    assert cells(report, "meta") == ["meta", "2k", "20", "200", "10.0 s", "score 0.8 at 1k steps"]


def test_jobs_of_a_stage_are_added_up(tmp_path):
    rows = [metric("tune", "policy_loss", 1.0, 100, 3, 0.0) | {"job": job} for job in "abc"]
    assert cells(text_report(run_of(tmp_path, metrics=rows)), "tune")[1:3] == ["300", "9"]


def test_jobs_without_metrics_count_the_steps_of_their_episodes(tmp_path):
    rows = [episode("tune", "test", task, step, 0.5) for task in (0, 1) for step in (0, 1)]
    assert cells(text_report(run_of(tmp_path, episodes=rows)), "tune", "Training")[1:3] == [
        "20",
        "3",
    ]


def test_jobs_without_metrics_count_the_steps_of_their_open_episodes(tmp_path):
    rows = [episode("tune", "test", task, 0, 0.5) for task in (0, 1)]
    done = [
        event("job_finished", '{"updates": 3, "env_steps": 64}') | {"stage": "tune", "job": job}
        for job in "ab"
    ]
    report = text_report(run_of(tmp_path, episodes=rows, events=done))
    assert cells(report, "tune", "Training")[1] == "128"


def test_time_between_kill_and_resume_is_not_training_time(tmp_path):
    rows = [metric("meta", "policy_loss", 1.0, steps, 3, 100.0 * steps) for steps in (1, 1000)]
    done = event("job_finished", '{"seconds": 50.0}')
    report = text_report(run_of(tmp_path, metrics=rows, events=[done]))
    assert cells(report, "meta")[3:5] == ["20", "50.0 s"]


def test_events_that_cost_something_are_counted(tmp_path):
    rows = [event("worker_lost", '{"shard": 1, "pid": 42}'), event("worker_lost"), event("commit")]
    report = text_report(run_of(tmp_path, events=list(reversed(rows))))
    assert cells(report, "worker_lost") == ["worker_lost", "2", "meta", "shard 1, pid 42"]
    assert "| commit " not in report


def test_how_a_run_ended_is_one_line_without_the_traceback(tmp_path):
    failed = {"error": "KeyError", "reason": "two\nlines", "traceback": "Traceback\n  File"}
    rows = [
        event("interrupted", '{"reason": "signal 15"}'),
        event("run_failed", json.dumps(failed)),
    ]
    report = text_report(run_of(tmp_path, events=rows))
    assert cells(report, "interrupted") == ["interrupted", "1", "meta", "reason signal 15"]
    assert cells(report, "run_failed")[3] == "error KeyError, reason two lines"


def test_a_run_without_rows_is_reported_as_such(tmp_path):
    report = text_report(run_of(tmp_path))
    assert "Nothing is committed yet." in report
    assert "seed       7" in report
    assert "cpus 4" in report


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run"):
        text_report(tmp_path / "nothing")


def test_an_evaluation_shows_its_numbers_of_episodes_and_tasks(tmp_path):
    rows = [episode("final", "test", t, s, 0.5) for t, s in itertools.product(range(3), range(2))]
    report = evaluation_report(load(run_of(tmp_path, episodes=rows)))
    assert report.startswith("6 episodes on 3 tasks")
    assert cells(report, "3 test tasks")


def test_every_built_in_family_is_listed():
    report = families_report()
    for name in SHORT_NAMES["tasks"]:
        assert len(cells(report, name)) == 6
    assert cells(report, "bandit")[2:5] == ["1 float32", "5 choices", "1 x 10"]


def test_the_next_steps_name_the_run(tmp_path):
    text = next_steps(tmp_path)
    for command in ("report", "evaluate", "resume"):
        assert f"python -m dmrl_ray {command} {tmp_path}" in text
