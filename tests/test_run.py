"""What a run keeps of itself when it goes back to its newest commit."""

import numpy as np
import pytest

from dmrl_ray.display import Display
from dmrl_ray.results import load
from dmrl_ray.run import Run
from dmrl_ray.writer import RunWriter
from dmrl_ray.yaml_config import parse_config

CONFIG = "{tasks: bandit, workers: {num: 0}, stages: {meta: {type: pretrain, env_steps: 1}}}"


@pytest.fixture
def run(tmp_path):
    with RunWriter.create(tmp_path / "run", CONFIG, {}) as writer:
        yield Run(parse_config(CONFIG, "run.yaml"), writer, Display(quiet=True), None)


def test_tasks_dropped_by_a_rollback_are_written_when_they_are_met_again(run):
    known = run.tasks("validation", 3)
    run.commit()
    lost = run.tasks("test", 2)
    run.rollback()
    run.tasks("validation", 3)
    run.tasks("test", 2)
    run.commit()
    written = load(run.writer.folder, table="tasks")["task_id"].tolist()
    assert sorted(written) == sorted(task.id for task in known + lost)


def test_a_rollback_before_the_first_commit_forgets_everything(run):
    run.state["job"] = {"updates": 3}
    run.save("meta.best", {"weight": np.zeros(3)})
    run.rollback()
    assert run.state == {"done": [], "job": None, "versions": {}}
    assert run.files == {}
