"""The operations of a row are counted as they are executed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.floor import DERIVED, config_of, env_s, rate, work
from benchmarks.throughput.rows import ROWS
from dmrl_ray.config.loading import parse_config
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import CollectCall
from dmrl_ray.jobs.spec import Weights, build, job_spec
from dmrl_ray.jobs.worker import RolloutWorker
from dmrl_ray.networks import linear


@pytest.mark.parametrize("row", ["cartpole", "maml"])
def test_operations_are_counted_as_pytorch_counts_them(row, monkeypatch):
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)  # whose products PyTorch does not count
    settings = ["workers.num=0", "learners.threads=1", "rollout.shards=1", "rollout.num_envs=20"]
    config = parse_config(ROWS[row].text, row, settings)
    spec = job_spec(config, "train")
    learner = Learner(spec)
    with FlopCounterMode(display=False) as counter:
        call, weights = CollectCall(spec, 0, 0, 0), Weights(0, learner.weights())
        report, trial, _ = RolloutWorker().collect(call, weights, {})
        learner.update(0, report.env_steps, [trial])
    # Observations need no gradient, which saves a little in the first layers.
    counted = counter.get_total_flops() / report.env_steps
    assert work(spec).operations == pytest.approx(counted, rel=0.05)


def test_an_lstms_work_by_hand():
    # 5 arms: inputs are a constant, and of what came before 5 actions, reward and end.
    # Gates 4 * 128 * (1 + 7 + 128), heads 5 * 128 and 128.
    need = work(job_spec(config_of("bandit_n10"), "train"))
    assert need.weights == 512 * 136 + 5 * 128 + 128
    assert need.operations == need.weights * (2 + 6 * 4)


@pytest.mark.parametrize("row", DERIVED)
def test_an_environment_can_be_timed(row):
    family = build(job_spec(config_of(row), "train")).distribution
    assert 0 < env_s(family, 8) < 1e-3


def test_a_rate_is_of_calls_a_second():
    x = torch.randn(100_000)
    one, two = (rate(lambda n=n: [x.tanh() for _ in range(n)], 0.1) for n in (1, 2))
    assert 1.5 < one / two < 2.7
