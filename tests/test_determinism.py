"""The number of workers, and the order in which they answer, change nothing but the speed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

CONFIG = """
name: delayed
tasks: {type: "delayed_family:DelayedCartPole"}
network: {encoder: {type: mlp, hidden_sizes: [16]}}
algorithm: {type: ppo, num_steps: 16, epochs: 2}
rollout: {shards: 3, num_envs: 8}
learners: {threads: 1}
stages:
  train: {type: pretrain, env_steps: 2000, validate_every: 3, validation_tasks: 4}
  special: {type: finetune, init_from: train, tasks: 3, updates: 1}
  held_out: {type: evaluate, init_from: train, tasks: 4, trials: 2}
"""


def play(folder: Path, *settings: str) -> tuple[dict[str, str], pd.DataFrame]:
    """Checksums of all policies, and the episodes, of a run."""
    config = parse_config(CONFIG, "delayed.yaml", list(settings))
    controller.run(config, folder, display=Display(quiet=True))
    newest = max((folder / "commits").glob("*.json"))
    files = json.loads(newest.read_text())["files"]
    rows = load(folder).drop(columns=["time", "run_id"])
    rows = rows.sort_values(list(rows.columns)).reset_index(drop=True)
    return {name: file["sha256"] for name, file in files.items()}, rows


@pytest.fixture(scope="module")
def without_ray(tmp_path_factory):
    return play(tmp_path_factory.mktemp("runs") / "0", "workers.num=0")


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_under_random_delays_gives_the_same_run(
    workers, without_ray, ray_instance, tmp_path
):
    policies, rows = play(tmp_path / "run", f"workers.num={workers}")
    assert policies == without_ray[0]
    pd.testing.assert_frame_equal(rows, without_ray[1])


def test_another_seed_gives_another_run(without_ray, tmp_path):
    policies, _ = play(tmp_path / "run", "workers.num=0", "seed=1")
    assert policies["train.last"] != without_ray[0]["train.last"]


def policy_lags(folder: Path) -> list[float]:
    return load(folder, table="metrics").query("name == 'policy_lag'")["value"].tolist()


@pytest.mark.parametrize("lag", [1, 2])
def test_with_a_lag_any_number_of_workers_gives_the_same_run(lag, ray_instance, tmp_path):
    runs = {
        n: play(tmp_path / str(n), f"workers.num={n}", f"stages.train.max_policy_lag={lag}")
        for n in (0, 2)
    }
    assert runs[0][0] == runs[2][0]
    pd.testing.assert_frame_equal(runs[0][1], runs[2][1])
    assert policy_lags(tmp_path / "0") == policy_lags(tmp_path / "2")


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_data_is_as_old_as_the_lag_and_never_older(lag, tmp_path):
    play(tmp_path / "run", "workers.num=0", f"stages.train.max_policy_lag={lag}")
    # The first iteration tells how long one is; those after it are begun together.
    lags = policy_lags(tmp_path / "run")
    assert lags == [0.0, *range(lag), *[lag] * (len(lags) - 1 - lag)]


def test_episodes_of_overlapping_iterations_are_counted_as_those_of_single_ones(tmp_path):
    for lag in (0, 2):
        play(tmp_path / str(lag), "workers.num=0", f"stages.train.max_policy_lag={lag}")
    # An episode of iteration i ended within the steps (i n, (i + 1) n].
    n = 3 * 8 * 16
    for lag in (0, 2):
        rows = load(tmp_path / str(lag)).query("stage == 'train' and split == 'train'")
        assert ((rows["env_steps"] - 1) // n == rows["trial"]).all()
        assert rows["trial"].max() > 2
