"""Runs in a process of its own, as it starts a cluster of several nodes on this machine.

Writes what happened to result.json in the folder that it is given.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TMPDIR=sys.argv[1],
    RAY_health_check_initial_delay_ms="0",
    RAY_health_check_period_ms="500",
    RAY_health_check_failure_threshold="4",
)

import ray
from ray.cluster_utils import Cluster
from test_cluster import assert_same, collect, finish, make_spec, start, undisturbed

from dmrl_ray.cluster.connection import connect
from dmrl_ray.cluster.learners import RayLearners
from dmrl_ray.cluster.pool import RayWorkers
from dmrl_ray.config.schema import LearnerSettings, RunConfig, WorkerSettings
from dmrl_ray.errors import JobLost
from dmrl_ray.jobs.learner import LocalLearners
from dmrl_ray.types import storable


def node_of(worker):
    call = worker.actor.__ray_call__
    return ray.get(call.remote(lambda self: ray.get_runtime_context().get_node_id()))


def wait_until_gone(cluster, node):
    cluster.remove_node(node, allow_graceful=False)
    while any(n["Alive"] and n["NodeID"] == node.node_id for n in ray.nodes()):
        time.sleep(0.1)


def mid_collect(cluster, nodes, workers):
    """A node goes away while its worker is busy."""
    spec = make_spec("mid collect", shards=3)
    weights = workers.put(LocalLearners(spec).published())
    states = [state for _, _, state in collect(workers, spec, 0, weights, [{}] * 3)]
    victim = workers.up()[0]
    os.kill(victim.pid, signal.SIGSTOP)
    node = nodes.pop(node_of_pid[victim.pid])
    started = start(workers, spec, 1, weights, states)
    wait_until_gone(cluster, node)
    answers = finish(workers, started)
    trials, states = undisturbed(spec, 2)
    assert_same([workers.fetch(trial) for _, trial, _ in answers], trials)
    after = [storable(workers.fetch(state)) for _, _, state in answers]
    assert_same(after, [storable(state) for state in states])


def lost_data(cluster, nodes, workers):
    """A node goes away with trials and states that no one has read yet."""
    spec = make_spec("lost data", tasks="cartpole", shards=3, num_envs=4000, num_steps=8)
    learners = RayLearners(spec, LearnerSettings(threads=4, device="cpu"))
    answers = collect(workers, spec, 0, learners.published(), [{}] * 3)
    by_node = {node_of(worker) for worker in workers.up()}
    node = nodes.pop(next(n for n in nodes if n in by_node))
    wait_until_gone(cluster, node)
    reasons = []
    try:
        learners.update(0, [trial for _, trial, _ in answers])
    except JobLost as error:
        reasons.append(str(error))
    try:
        collect(workers, spec, 1, learners.published(), [state for _, _, state in answers])
    except JobLost as error:
        reasons.append(str(error))
    learners.close()
    return reasons


cluster = Cluster(
    initialize_head=True,
    head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8},
)
small = {"num_cpus": 2, "object_store_memory": 10**8}
added = [cluster.add_node(**small) for _ in range(3)]
cluster.add_node(num_cpus=4, labels={"dmrl/pool": "learner"}, object_store_memory=10**8)
nodes = {node.node_id: node for node in added}
stage = {"type": "pretrain", "env_steps": 1}
config = RunConfig.model_validate({"tasks": "bandit", "stages": {"meta": stage}})
facts = connect(cluster.address, config)
workers = RayWorkers(WorkerSettings(num=3))
workers.events = []
workers.start()
node_of_pid = {worker.pid: node_of(worker) for worker in workers.up()}
result = {"facts": facts, "nodes": list(node_of_pid.values()), "small": list(nodes)}
mid_collect(cluster, nodes, workers)
while workers.alive < 3:
    workers._pump(0.2)
result["after"] = [node_of(worker) for worker in workers.up()]
result["lost"] = lost_data(cluster, nodes, workers)
more = workers.ready([], 0.0)[1]
result["events"] = [[event.event, event.detail] for event in workers.events + more]
(Path(sys.argv[1]) / "result.json").write_text(json.dumps(result))  # Ray prints, too.
workers.close()
ray.shutdown()
cluster.shutdown()
