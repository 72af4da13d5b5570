"""A killed run goes on as if it had never been killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmrl_ray.results.reading import load

ROOT = Path(__file__).parents[2]

CONFIG = """
name: killed
tasks: {type: cartpole}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [16]}}
algorithm: {type: ppo, num_steps: 16, epochs: 1}
rollout: {shards: 2, num_envs: 8}
workers: {num: 0}
learners: {threads: 1}
commit: {every_updates: 2}
stages:
  train: {type: pretrain, env_steps: 3072, validate_every: 4, validation_tasks: 4}
  special:
    type: finetune
    init_from: train
    rollout: {num_envs: 4}
    tasks: 3
    updates: 2
  held_out: {type: evaluate, init_from: train, tasks: 4}
"""

RECORDED = f"""
{CONFIG.partition("stages:")[0]}
stages:
  train: {{type: pretrain, env_steps: 1024, validation_tasks: 4, record: true}}
  again: {{type: finetune, init_from: train, split: train, tasks: 2, updates: 2, record: true}}
  seen: {{type: evaluate, init_from: train, tasks: 3, trials: 2, record: true}}
  cloned:
    type: pretrain
    algorithm: {{type: behavior_cloning, num_steps: 16, data: {{stage: again}}}}
    env_steps: 1536
    validation_tasks: 4
"""


class Server:
    """Runs of the config above in forked children of one process."""

    def __init__(self, root: Path, workers: int = 0, config: str = CONFIG) -> None:
        self.config = root / "config.yaml"
        self.config.write_text(config.replace("{num: 0}", f"{{num: {workers}}}"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("run_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self, do: str, folder: Path, crash_at: int | None = None, changed: Sequence[str] = ()
    ) -> int:
        request = {"do": do, "config": str(self.config), "folder": str(folder)}
        request["changed"] = list(changed)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**request, "crash_at": crash_at}) + "\n")
        self.process.stdin.flush()
        return int(self._read()["pid"])

    def wait(self) -> dict[str, int]:
        return self._read()

    def play(
        self, do: str, folder: Path, crash_at: int | None = None, changed: Sequence[str] = ()
    ) -> dict[str, int]:
        self.start(do, folder, crash_at, changed)
        return self.wait()

    def finish(self, folder: Path) -> None:
        """Resume (or begin, if nothing was there yet to resume) until the run is done."""
        begun = (folder / "run.json").exists()
        status = self.play("resume" if begun else "run", folder)["status"]
        assert status == 0

    def _read(self) -> dict[str, int]:
        assert self.process.stdout is not None
        message: dict[str, int] = json.loads(self.process.stdout.readline())
        return message


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.kill()


@pytest.fixture(scope="module")
def ray_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("ray_server"), workers=2)
    yield server
    server.process.kill()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    start = time.monotonic()
    answer = server.play("run", folder)
    assert answer["status"] == 0
    return folder, time.monotonic() - start, answer["operations"]


def rows(folder: Path) -> pd.DataFrame:
    frame = load(folder, table="episodes").drop(columns=["time", "run_id"])
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)


def steps(folder: Path) -> pd.DataFrame:
    return load(folder, table="transitions").drop(columns="run_id")


def metrics(folder: Path) -> pd.DataFrame:
    frame = load(folder, table="metrics").drop(columns=["time", "run_id"])
    frame = frame[~frame["name"].str.contains("time/|steps_per_s")]
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)


def weights(folder: Path) -> dict[str, str]:
    """Checksums of the policies in the newest commit."""
    newest = max((folder / "commits").glob("*.json"))
    files = json.loads(newest.read_text())["files"]
    return {name: file["sha256"] for name, file in files.items()}


def assert_equal(folder: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(rows(folder), rows(other))
    pd.testing.assert_frame_equal(metrics(folder), metrics(other))
    assert weights(folder) == weights(other)


def kill_at_random(
    server: Server, reference: Path, duration: float, tmp_path: Path, kills: int
) -> None:
    rng = np.random.default_rng(kills)
    done = 0
    run = 0
    while done < kills:
        folder = tmp_path / str(run)
        run += 1
        for _ in range(4):
            begun = (folder / "run.json").exists()
            pid = server.start("resume" if begun else "run", folder)
            time.sleep(rng.uniform(0.02, duration))
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            finished = server.wait()["status"] == 0
            if (folder / "commits").exists() and any((folder / "episodes").glob("part-*")):
                rows(folder)
            if finished:
                break
            done += 1
        server.finish(folder)
        assert_equal(folder, reference)


def test_the_same_seed_gives_the_same_run(server, undisturbed, tmp_path):
    assert server.play("run", tmp_path / "again")["status"] == 0
    assert_equal(tmp_path / "again", undisturbed[0])


def test_a_run_killed_at_random_moments_ends_like_the_undisturbed(server, undisturbed, tmp_path):
    kill_at_random(server, undisturbed[0], undisturbed[1], tmp_path, kills=4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_40_random_moments_ends_like_the_undisturbed(server, undisturbed, tmp_path):
    kill_at_random(server, undisturbed[0], undisturbed[1], tmp_path, kills=40)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_on_ray_killed_at_40_random_moments_ends_like_the_undisturbed_without_ray(
    ray_server, undisturbed, tmp_path
):
    start = time.monotonic()
    assert ray_server.play("run", tmp_path / "whole")["status"] == 0
    assert_equal(tmp_path / "whole", undisturbed[0])
    kill_at_random(
        ray_server, undisturbed[0], time.monotonic() - start, tmp_path / "killed", kills=40
    )


def crash_before(server: Server, undisturbed, tmp_path: Path, operations: range) -> None:
    for k in operations:
        folder = tmp_path / str(k)
        assert os.WIFSIGNALED(server.play("run", folder, crash_at=k)["status"])
        server.finish(folder)
        assert_equal(folder, undisturbed[0])


def test_a_run_killed_before_some_file_operations_ends_like_the_undisturbed(
    server, undisturbed, tmp_path
):
    operations = undisturbed[2]
    crash_before(server, undisturbed, tmp_path, range(5, operations + 1, operations // 5))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_before_every_file_operation_ends_like_the_undisturbed(
    server, undisturbed, tmp_path
):
    crash_before(server, undisturbed, tmp_path, range(1, undisturbed[2] + 1))


def test_a_run_that_records_and_learns_from_it_ends_like_the_undisturbed(tmp_path):
    server = Server(tmp_path, config=RECORDED)
    try:
        whole = server.play("run", tmp_path / "whole")
        assert whole["status"] == 0
        expected = steps(tmp_path / "whole")
        assert set(expected["stage"]) == {"train", "again", "seen"}
        for k in range(whole["operations"] // 5, whole["operations"] + 1, whole["operations"] // 4):
            folder = tmp_path / str(k)
            assert os.WIFSIGNALED(server.play("run", folder, crash_at=k)["status"])
            server.finish(folder)
            pd.testing.assert_frame_equal(steps(folder), expected)
            assert weights(folder) == weights(tmp_path / "whole")
    finally:
        server.process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_commits_first(server, undisturbed, tmp_path, number):
    folder = tmp_path / "stopped"
    pid = server.start("run", folder)
    while not list((folder / "commits").glob("*.json")):
        time.sleep(0.01)
    asked = time.monotonic()
    os.kill(pid, number)
    status = server.wait()["status"]
    assert time.monotonic() - asked < 2.5
    assert os.waitstatus_to_exitcode(status) == 128 + number
    server.finish(folder)
    assert_equal(folder, undisturbed[0])
