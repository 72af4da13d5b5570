"""The breakdown of training time in metrics."""

import re

import pytest

from dmrl_ray.config.loading import parse_config
from dmrl_ray.control import controller
from dmrl_ray.control import train_loop as jobs
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

CONFIG = """
tasks: {type: bandit, arms: 2, pulls: 5}
network: {type: actor_critic, encoder: {type: lstm, hidden_size: 4}}
algorithm: rl2
rollout: {shards: 2, num_envs: 8}
workers: {num: 0}
stages: {meta: {type: pretrain, env_steps: 400, validate_every: 2, validation_tasks: 4}}
"""


@pytest.fixture(scope="module")
def seconds(tmp_path_factory):
    folder = controller.run(
        parse_config(CONFIG, "text"),
        tmp_path_factory.mktemp("runs") / "run",
        display=Display(quiet=True),
    )
    metrics = load(folder, table="metrics")
    wide = metrics.pivot_table(index="policy_version", columns="name", values="value")
    return wide.filter(like="time/").fillna(0.0)


def test_every_time_is_explained(seconds):
    explained = set(re.findall(r"time/\w+", jobs.__doc__))
    assert set(seconds.columns) == explained - {"time/compile_s"}  # nothing was compiled


def test_parts_are_no_more_than_the_whole(seconds):
    assert (seconds > 0).any().all()
    # In one process the shards take turns, and the learner waits for each.
    parts = seconds["time/env_s"] + seconds["time/inference_s"]
    assert (parts < seconds["time/shards_s"]).all()
    waited_for = [f"time/{name}_s" for name in ("shards", "write", "validate")]
    assert (seconds[waited_for].sum(axis=1) < seconds["time/learner_wait_s"]).all()
    assert (seconds["time/update_s"] < seconds["time/learner_call_s"]).all()


def test_validation_takes_time_where_it_was_due(seconds):
    # Validated after updates 2 and 4; what that took counts for the update after.
    assert (seconds["time/validate_s"] > 0).tolist() == [False, False, True, False, True]
