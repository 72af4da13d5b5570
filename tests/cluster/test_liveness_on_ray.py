"""Workers that are hung are replaced, those that are busy are not, and what kills them is named."""

import os
import signal
import time

import pytest

from dmrl_ray.config.schema import Component, EnvironmentSettings, RolloutSettings, WorkerSettings
from dmrl_ray.errors import ClusterError
from dmrl_ray.jobs import liveness
from dmrl_ray.jobs.learner import LocalLearners
from dmrl_ray.jobs.messages import CollectCall
from dmrl_ray.jobs.protocols import answers
from dmrl_ray.jobs.spec import JobSpec
from dmrl_ray.jobs.worker import collect_calls
from dmrl_ray.types import EnvironmentFault

ray = pytest.importorskip("ray")


def make_spec(family):
    return JobSpec(
        stage="meta",
        name="job",
        seed=7,
        tasks=Component(type=f"families:{family}"),
        network=Component(type="actor_critic"),
        algorithm=Component(type="ppo", num_steps=4),
        rollout=RolloutSettings(shards=2, num_envs=2),
        env_steps=100,
    )


@pytest.fixture
def workers(ray_instance):
    from dmrl_ray.cluster.pool import RayWorkers

    found = []

    def make(num=1, timeout_s=None):
        environments = EnvironmentSettings(timeout_s=timeout_s)
        found.append(RayWorkers(WorkerSettings(num=num), environments))
        found[0].start()
        return found[0]

    yield make
    for pool in found:
        pool.close()


def collect(workers, family, events):
    """One iteration of two shards."""
    spec = make_spec(family)
    calls = [CollectCall(spec, shard, 3, 0) for shard in range(2)]
    weights = workers.put(LocalLearners(spec).published())
    ids = [workers.submit(call) for call in collect_calls(calls, weights, [{}, {}])]
    return list(answers(workers, ids, on_event=events.append))


@pytest.mark.parametrize("family", ["Sleepy", "Looping"])
def test_a_worker_in_a_long_reset_is_waited_for_and_that_is_told(workers, family, monkeypatch):
    monkeypatch.setattr(liveness, "BLOCKED_S", 1.0)  # A reset takes 4 s.
    monkeypatch.setattr(liveness, "TOLD_AFTER_S", 1.5)
    events = []
    assert len(collect(workers(2), family, events)) == 2
    assert {event.event for event in events} == {"environment_waited_for"}
    assert events[0].detail["message"].startswith("waiting in reset of all environments, the first")


def test_a_worker_that_is_blocked_outside_environments_is_replaced_and_its_call_named(
    workers, monkeypatch
):
    monkeypatch.setattr(liveness, "BLOCKED_S", 1.0)
    events = []
    with pytest.raises(
        ClusterError,
        match=r"3 workers died of one call \(collect, stage meta, job job, seed 7, shard 0, "
        r"iteration 3\), the last one outside environments, because of blocked without CPU time",
    ):
        collect(workers(), "Blocked", events)


def test_a_worker_of_another_node_is_looked_at_from_there(workers):
    pool, events = workers(), []
    pool._watchers._here = "another node"
    pid = pool.pids()[0]
    os.kill(pid, signal.SIGSTOP)
    collect(pool, "PointGoal", events)
    assert events[0].detail["reason"].startswith("stopped for")
    (worker,) = pool.up()
    os.kill(worker.pid, signal.SIGKILL)
    assert pool._watchers.last(worker.place).doing.what == "idle"


def test_a_call_of_an_environment_that_takes_longer_than_it_may_is_named(workers):
    events = []
    with pytest.raises(
        EnvironmentFault,
        match=r"^task family 'families:Sleepy', in collect, .* shard \d, iteration 3: reset of all "
        r"environments, the first of them on task \w{16} has not returned after \d\.\d s, and "
        r"environments\.timeout_s is 1",
    ):
        collect(workers(timeout_s=1.0), "Sleepy", events)


def test_the_third_worker_that_dies_of_a_call_is_the_last(workers):
    events, began = [], time.monotonic()
    with pytest.raises(
        EnvironmentFault,
        match=r"^task family 'families:Ending': 3 workers died of one call \(collect, stage meta, "
        r"job job, seed 7, shard 0, iteration 3\), the last one in step of all environments",
    ):
        collect(workers(), "Ending", events)
    lost = [event for event in events if event.event == "worker_lost"]
    assert len(lost) <= 3
    assert time.monotonic() - began > 1  # at once, then after a second
