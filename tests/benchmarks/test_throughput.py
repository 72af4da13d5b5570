"""The rows of the table of speed, and the summary of their figures."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import machine
from benchmarks.throughput.measures import MEASURES, nullified, seconds_to_target, training_returns
from benchmarks.throughput.probe import PATIENCE, Point, Probe, speed
from benchmarks.throughput.rows import ROWS
from benchmarks.throughput.table import COLUMNS, cost_of, number, summary, table
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = [(row, variant) for row in ROWS for variant in ROWS[row].variants]


@pytest.mark.parametrize(("row", "variant"), VARIANTS)
def test_a_row_is_a_run_that_fits_together(row, variant):
    settings = ROWS[row].variants[variant].settings
    controller.check(parse_config(ROWS[row].text, "row", list(settings)))
    assert ROWS[row].measure in MEASURES


def test_speed_is_of_the_time_between_two_moments():
    # 1000 steps in 2 s, 3 CPU seconds of the run and 4 of the machine.
    figures = speed(Point(10.0, 500, 1.0, 100.0), Point(12.0, 1500, 4.0, 104.0))
    assert figures == {"sps": 500, "cpu_us_per_step": 3000, "cores": 1.5, "external": 0.5}


def test_median_and_spread_by_hand():
    # Spread: (6 - 3) / 4.
    (figure,) = summary([{"sps": 4.0}, {"sps": 3.0}, {"sps": 6.0}]).values()
    assert figure == {"median": 4, "spread": 0.75, "known": 3}


def test_a_target_that_most_runs_missed_has_no_median():
    runs = [{"s": 2.0}, {"s": None}, {"s": 3.0}]
    assert summary(runs)["s"]["median"] == 3  # the second of 2, 3, never
    assert summary([*runs, {"s": None}])["s"] == {"median": None, "spread": 0, "known": 2}


def line(variant, cpu, **figures):
    figures = {"sps": 152_300.0, "cpu_us_per_step": cpu, **figures}
    text = {"row": "tables", "title": "work", "variant": variant, "runs": 3}
    return {**text, "figures": summary([figures] * 3)}


def test_the_table_shows_every_figure_once():
    lines = table([line("2 workers", 12.0, to_target_s=None, cores=1.5)]).splitlines()
    assert len(lines) == 3
    assert lines[2].count(" | ") == len(COLUMNS) - 1
    for part in ("152 k", "12 (spread 0%)", "not in 3 of 3 runs", "cores 1.5"):
        assert lines[2].count(part) == 1


def test_the_cost_of_writing_is_a_fraction_of_the_throughput():
    # 10 us a step without rows are 12.5 with them: 80 of 100 steps are left.
    costs = cost_of([line("no rows", 10.0), line("tables", 12.5)], "no rows")
    assert costs == {"tables": pytest.approx(0.2)}


def test_numbers_have_three_digits_that_count():
    values = (1_234_567, 152_345, 1520, 12.34, 0.1234)
    assert [number(x) for x in values] == ["1.23 M", "152 k", "1520", "12.3", "0.123"]


def probed(monkeypatch, probe, returns):
    """Updates until the probe asks the run to stop, one a second, with these returns."""
    asked = []
    monkeypatch.setattr(signal, "raise_signal", asked.append)
    for i, value in enumerate(returns):
        monkeypatch.setattr("time.monotonic", lambda now=float(i): now)
        probe.update("train", 100 * i, sps=1.0, return_=value)
        if asked:
            return i
    return None


def test_a_run_is_measured_for_its_seconds(monkeypatch):
    probe = Probe(10.0)
    assert probed(monkeypatch, probe, [0.0] * 20) == 10
    # A fifth of the time is warm-up.
    assert [point.steps for point in probe.points] == [200, 1000]


def test_a_run_is_extended_to_its_target_or_its_limit(monkeypatch):
    returns = [0.0] * 15 + [5.0] * 30
    assert probed(monkeypatch, Probe(10.0, target=5.0, limit=100.0), returns) == 14 + PATIENCE
    assert probed(monkeypatch, Probe(10.0, target=6.0, limit=20.0), returns) == 20


def test_the_time_to_the_target_is_counted_from_the_first_rollout(monkeypatch):
    # The first update came after 100 steps at 50 a second, so 2 s after the beginning.
    at = pd.Timestamp("2026-01-01", tz="UTC")
    after = [at + pd.Timedelta(seconds=s) for s in (0, 1, 2, 3)]
    episodes = pd.DataFrame(
        {"split": "train", "env_steps": [1, 2, 3, 4], "return": [0.0, 4, 4, 9], "time": after}
    )
    metrics = pd.DataFrame(
        {"name": ["steps_per_s"], "env_steps": [100], "value": [50.0], "time": [at]}
    )
    monkeypatch.setattr("benchmarks.throughput.measures.load", lambda *_, **__: episodes)
    newest = training_returns(Path(), 2)
    assert newest["newest"].iloc[1:].tolist() == [2.0, 4.0, 6.5]
    assert seconds_to_target(newest, metrics, 4.0) == 2 + 2
    assert seconds_to_target(newest, metrics, 7.0) is None


def test_rows_are_left_out_for_a_while_only():
    class Book:
        def add(self, row):
            return row

    with nullified(Book, ("add",)):
        assert Book().add(3) is None
    assert Book().add(3) == 3


def test_cpu_time_of_a_child_counts():
    before = machine.cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert 0.4 < machine.cpu_seconds() - before < 2.0
    assert machine.resident_mb(os.getpid()) > 10
    assert "python" in machine.command_of(os.getpid())


def test_a_busy_step_has_the_configured_cost():
    import time

    from benchmarks.busy import Busy

    family = Busy(Busy.Config(step_ms=2.0))
    env = family.make_vec(5)
    env.set_tasks(family.sample(np.random.default_rng(0), 5, "train"))
    env.reset(seed=0)
    start = time.thread_time()
    reward = env.step(env.rewarded)[1]
    assert 0.010 <= time.thread_time() - start < 0.015
    assert reward.tolist() == [1.0] * 5


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_row_can_be_measured(row):
    command = [sys.executable, "-m", "benchmarks.throughput", "--rows", row, "--runs", "1"]
    command += ["--seconds", "1", "--limit", "1"]
    command += ["--updates", "2", "20"] if ROWS[row].memory_at else []
    answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(text) for text in answer.stdout.splitlines() if text[0] == "{"][:-1]
    assert [found["variant"] for found in lines] == list(ROWS[row].variants)
    for found in lines:
        wanted = {name for name in found["figures"] if name != "to_target_s"}
        assert all(found["figures"][name]["median"] is not None for name in wanted)
