"""A whole run on three nodes of one machine, one of which is removed; a process of its own.

Writes what it saw to result.json in the folder that it is given; the run is in run/.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TMPDIR=sys.argv[1],
    RAY_health_check_initial_delay_ms="0",
    RAY_health_check_period_ms="500",
    RAY_health_check_failure_threshold="4",
)

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from dmrl_ray.config.loading import load_config
from dmrl_ray.control import controller
from dmrl_ray.results.display import Display

ROOT = Path(__file__).resolve().parents[2]
REMOVE_AT = 24_000


def worker_nodes() -> list[str]:
    """Nodes that workers live on."""
    return [
        actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["ActorClassName"] == "WorkerActor" and actor["State"] == "ALIVE"
    ]


class Saboteur(Display):
    """Removes a node that a worker lives on, once, in the middle of training."""

    def update(self, stage: str, steps: int, *arguments: object, **figures: object) -> None:
        if stage == "meta" and steps >= REMOVE_AT and "before" not in result:
            result["before"] = worker_nodes()
            victim = nodes.pop(result["before"][0])
            result["removed"] = victim.node_id
            cluster.remove_node(victim, allow_graceful=False)
        result["after"] = worker_nodes()


result: dict[str, object] = {}
head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 10**8}
cluster = Cluster(initialize_head=True, head_node_args=head)
added = [cluster.add_node(num_cpus=2, object_store_memory=10**8) for _ in range(3)]
cluster.add_node(num_cpus=2, labels={"dmrl/pool": "learner"}, object_store_memory=10**8)
nodes = {node.node_id: node for node in added}
settings = ["workers.num=3", "rollout.shards=3", "learners.threads=1", "commit.every_updates=1"]
config = load_config(ROOT / "configs" / "smoke.yaml", settings)
folder = Path(sys.argv[1]) / "run"
controller.run(config, folder, address=cluster.address, display=Saboteur(quiet=True))
(Path(sys.argv[1]) / "result.json").write_text(json.dumps(result))
ray.shutdown()
cluster.shutdown()
