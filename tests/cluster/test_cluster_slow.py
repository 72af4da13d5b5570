"""Several nodes: a cluster of three small ones and one for learners, on this machine."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def result():
    """What `three_nodes.py` saw: it removes a node in mid-collection, and another afterwards."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # Ray's sockets need short names.
        run = subprocess.run(
            [sys.executable, str(HERE / "three_nodes.py"), folder],
            env={**os.environ, "PYTHONPATH": paths},
            cwd=HERE.parent,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert run.returncode == 0, run.stderr
        return json.loads((Path(folder) / "result.json").read_text())


def test_workers_spread_over_all_nodes_but_the_learners(result):
    assert sorted(result["nodes"]) == sorted(result["small"])
    assert result["facts"]["nodes"] == 5
    assert result["facts"]["cpus"] == 10


def test_the_loss_of_a_node_in_mid_collection_changes_no_bit(result):
    # `three_nodes.py` compares every array with those of one process.
    assert [event for event, _ in result["events"]][:2] == ["worker_lost", "worker_replaced"]
    gone = result["nodes"][0]
    assert len(result["after"]) == 3
    assert gone not in result["after"]


def test_data_lost_with_its_node_loses_the_job(result):
    trials, states = result["lost"]
    assert "Failed to retrieve object" in trials
    assert "Failed to retrieve object" in states
