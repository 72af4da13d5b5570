"""Threads that share a minibatch end where one thread does, and where they ended before."""

import numpy as np
import pytest
import torch
from torch import nn

from dmrl_ray.algorithms.team import MIN_SAMPLES, Team, divisible, one_thread
from dmrl_ray.config import Component, RolloutSettings
from dmrl_ray.learner import Learner
from dmrl_ray.spec import JobSpec, Weights
from dmrl_ray.worker import CollectCall, RolloutWorker

LSTM = {"type": "lstm", "size": 8}
DROPOUT = {"type": "mlp", "sizes": [16], "dropout": 0.5}


def make_spec(threads, encoder, algorithm, tasks, num_envs):
    parts = (tasks, {"type": "actor_critic", "encoder": encoder}, algorithm)
    parts = (Component.model_validate(part) for part in parts)
    rollout = RolloutSettings(shards=1, num_envs=num_envs)
    return JobSpec("s", "s", 0, *parts, rollout, learner_threads=threads, env_steps=10**6)


def updated(threads, encoder, algorithm=None, tasks="cartpole", num_envs=96):
    """Weights and metrics after two updates on the same experience, and shares of a minibatch."""
    algorithm = algorithm or {"type": "ppo", "num_steps": 64, "minibatches": 2}
    learner = Learner(make_spec(threads, encoder, algorithm, tasks, num_envs))
    counts, deal = set(), learner.algorithm.team.map

    def counted(function, shares):
        counts.add(len(shares))
        return deal(function, shares)

    learner.algorithm.team.map = counted
    worker = RolloutWorker()
    call = CollectCall(make_spec(1, encoder, algorithm, tasks, num_envs), 0, 0, 0)
    _, trial, _ = worker.collect(call, Weights(0, learner.weights()), {})
    metrics = [learner.update(i, 0, [trial]) for i in range(2)][-1]
    return learner.weights(), metrics, counts


@pytest.mark.parametrize(
    "case",
    [
        dict(encoder={"type": "mlp", "sizes": [16]}),
        dict(encoder=LSTM),
        dict(
            encoder=LSTM,
            algorithm={"type": "rl2", "minibatches": 2},
            tasks={"type": "bandit", "pulls": 10},
            num_envs=512,
        ),
    ],
    ids=["mlp", "lstm", "rl2"],
)
def test_threads_end_where_one_thread_does(case):
    alone, alone_metrics, _ = updated(1, **case)
    shared, metrics, counts = updated(3, **case)
    assert counts == {3}
    for name, weights in alone.items():
        assert shared[name] == pytest.approx(weights, abs=2e-4), name
    for name in ("policy_loss", "value_loss", "entropy", "grad_norm"):
        assert metrics[name] == pytest.approx(alone_metrics[name], abs=2e-3), name


def test_threads_end_in_the_same_bits_every_time():
    first, again = (updated(3, LSTM)[0] for _ in range(2))
    for name, weights in first.items():
        np.testing.assert_array_equal(again[name], weights)


def test_dropout_is_not_divided_since_its_random_numbers_come_in_one_order():
    _, _, counts = updated(3, DROPOUT)
    assert counts == set()  # by the team of three; one share by a team of one


def test_batch_statistics_are_not_divided_while_they_move():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.0))
    assert not divisible(network)
    assert divisible(network.eval())
    assert divisible(nn.Dropout(0.0))


def test_short_minibatches_are_not_divided():
    team = Team(4)
    assert team.shares(10, MIN_SAMPLES // 10) == [slice(0, 10)]
    assert len(team.shares(MIN_SAMPLES, 3)) == 3
    assert [s.stop - s.start for s in team.shares(4 * MIN_SAMPLES, 1)] == [MIN_SAMPLES] * 4


def test_shares_are_every_column_once_in_order():
    columns = list(range(1501))
    assert [c for share in Team(3).shares(1501, 2) for c in columns[share]] == columns


def test_answers_come_in_the_order_of_the_shares():
    assert Team(3).map(lambda x: x * x, [3, 1, 2]) == [9, 1, 4]


def test_what_a_thread_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        Team(2).map(lambda x: 1 / x, [1, 0])


def test_threads_are_as_many_as_before_afterwards():
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
