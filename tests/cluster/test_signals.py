"""What signals and the loss of Ray do to a run on a Ray of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dmrl_ray.store.commit_records import verify

CONFIG = """\
tasks: {type: point_goal}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 8, epochs: 1}
rollout: {shards: 2, num_envs: 4}
workers: {num: 2}
learners: {threads: 1}
commit: {every_updates: 1}
stages: {train: {type: pretrain, env_steps: 100_000_000, validate_every: 20, validation_tasks: 2}}
"""


class Running:
    """A run by the command line, in a session of its own."""

    def __init__(self, folder):
        (folder / "c.yaml").write_text(CONFIG)
        self.folder = folder / "run"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dmrl_ray", "run", "c.yaml", "--out", "run"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def others(self, name=""):
        """Process ids of other living processes of the session."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                pid, text = int(stat.parent.name), stat.read_text()
                state, _, _, session = text.rpartition(")")[2].split()[:4]
                ours = int(session) == self.process.pid != pid
                if ours and state != "Z" and name in text:
                    found.append(pid)
        return found

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)

    def ends(self, within_s, cleared_s=15):
        """Its exit code and what it said; nothing of Ray stays."""
        asked = time.monotonic()
        code, said = self.process.wait(timeout=90), self.process.stderr.read()
        assert time.monotonic() - asked < within_s, said
        while self.others():
            assert time.monotonic() - asked < within_s + cleared_s, self.others()
            time.sleep(0.1)
        return code, said


@pytest.fixture
def running(tmp_path):
    run = Running(tmp_path)
    yield run
    for pid in run.others():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.process.kill()


def test_a_stop_while_ray_starts_is_heeded_and_leaves_nothing(running):
    running.wait_for(lambda: running.others("gcs_server"))
    running.process.send_signal(signal.SIGTERM)
    code, said = running.ends(within_s=3)
    assert code == 143
    assert said.endswith("interrupted; resume with: python -m dmrl_ray resume run\n")
    assert verify(running.folder) == []


def in_training(running):
    running.wait_for(lambda: len(list((running.folder / "commits").glob("0*.json"))) > 2)
    return [pid for pid in running.others() if pid != running.process.pid]


@pytest.mark.slow
def test_sigterm_to_all_processes_is_an_interruption(running):
    for pid in [*in_training(running), running.process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    code, said = running.ends(within_s=10)
    assert code == 143
    assert said.startswith("SIGTERM: stopping")
    assert "Traceback" not in said
    assert verify(running.folder) == []


@pytest.mark.slow
def test_a_run_whose_cluster_is_lost_says_so_and_ends(running):
    in_training(running)
    for pid in running.others("gcs_server"):
        os.kill(pid, signal.SIGKILL)
    # Ray's agents look for the cluster for a minute.
    code, said = running.ends(within_s=10, cleared_s=75)
    assert code == 6
    assert said.count("\n") == 1
    assert re.match(r"error: the Ray cluster at \S+ was lost \(.*\); what is committed", said)
    assert verify(running.folder) == []
