"""RLlib takes seconds and hundreds of megabytes to import, so it is imported on demand only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import sys
from typer.testing import CliRunner
from dmrl_ray import __main__ as cli
changes = ["stages.meta.env_steps=1", "stages.multitask.env_steps=1", "workers.num=0"]
answer = CliRunner().invoke(cli.app, ["run", "smoke", *changes, "--out", {out!r}])
assert answer.exit_code == 0, answer.output
"""

ON_RAY = """
import ray, sys
from dmrl_ray.cluster import pool as cluster
from dmrl_ray.cluster import learners as ray_learners
from dmrl_ray.control import stages
from dmrl_ray.cluster.pool import WorkerActor
"""

NONE = """
found = [name for name in sys.modules if name.startswith(("ray.rllib", "dmrl_ray.rllib"))]
assert not found, found
"""


@pytest.mark.parametrize("what", [RUN, ON_RAY], ids=["a run", "workers and learners on Ray"])
def test_nothing_of_rllib_is_imported(what, tmp_path):
    code = what.format(out=str(tmp_path / "run")) + NONE
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
