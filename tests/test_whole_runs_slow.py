"""Whole runs where users run them: submitted as a Ray job, and on several nodes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest

from dmrl_ray.config.loading import load_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent
PORT, DASHBOARD = 6397, 8297


def episodes(folder: Path) -> pd.DataFrame:
    frame = load(folder).drop(columns=["time", "run_id"])
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)


@pytest.fixture
def head():
    """A Ray head of this machine; its processes are ended one by one, and no others."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        binaries = Path(sys.executable).parent
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
        environment["PATH"] = f"{binaries}:{os.environ['PATH']}"  # An activated environment.
        # What is not in the working directory is not there: the checkout alone must do.
        environment.pop("PYTHONPATH", None)
        ports = ["--ray-client-server-port=20031", "--dashboard-agent-listen-port=52397"]
        size = ["--num-cpus=4", "--object-store-memory=100000000", "--disable-usage-stats"]
        own = [f"--port={PORT}", f"--dashboard-port={DASHBOARD}", f"--temp-dir={folder}"]
        ray = str(binaries / "ray")
        subprocess.run(
            [ray, "start", "--head", *own, *ports, *size],
            env=environment,
            check=True,
            capture_output=True,
            timeout=120,
        )
        yield ray, environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if folder in command:
                os.kill(int(process.name), signal.SIGKILL)


def test_a_submitted_job_ends_like_a_run_in_this_process(head, tmp_path):
    ray, environment = head
    command = ["python", "-m", "dmrl_ray", "run"]
    command += ["configs/smoke.yaml", "learners.threads=1", "--out", str(tmp_path / "submitted")]
    subprocess.run(
        [ray, "job", "submit", "--working-dir", ".", "--", *command],
        cwd=ROOT,
        env=environment,
        check=True,
        timeout=500,
    )
    facts = json.loads((tmp_path / "submitted" / "run.json").read_text())
    assert facts["facts"]["ray_job_id"].startswith("raysubmit_")
    config = load_config(ROOT / "configs/smoke.yaml", ["workers.num=0", "learners.threads=1"])
    controller.run(config, tmp_path / "here", display=Display(quiet=True))
    pd.testing.assert_frame_equal(episodes(tmp_path / "submitted"), episodes(tmp_path / "here"))


def test_a_run_uses_three_nodes_and_survives_the_loss_of_one(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        subprocess.run(
            [sys.executable, str(ROOT / "tests" / "cluster" / "run_on_three_nodes.py"), folder],
            env={**os.environ, "PYTHONPATH": paths},
            cwd=ROOT,
            check=True,
            timeout=500,
        )
        result = json.loads((Path(folder) / "result.json").read_text())
        assert len(set(result["before"])) == 3
        assert result["removed"] not in result["after"]
        assert len(result["after"]) == 3
        config = load_config(
            ROOT / "configs/smoke.yaml",
            ["workers.num=0", "rollout.shards=3", "learners.threads=1"],
        )
        controller.run(config, tmp_path / "here", display=Display(quiet=True))
        pd.testing.assert_frame_equal(episodes(Path(folder) / "run"), episodes(tmp_path / "here"))
