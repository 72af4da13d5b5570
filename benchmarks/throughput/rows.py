"""The rows of the table of speed: configs, variants and durations."""

from __future__ import annotations

from dataclasses import dataclass, field

SYMMETRIC = "network.encoder={type: symmetric, updates: taken}"
SHORT_SIGHTED = (  # as in configs/bandit_n100_rl2.yaml
    "algorithm.lr=1e-3",
    "algorithm.gamma=0.95",
    "algorithm.gae_lambda=0.7",
    "algorithm.entropy_coef=0.02",
    "rollout.num_envs=128",
)
BFLOAT16 = "learners.precision=bfloat16"
COMPILED = ("workers.num=0", "learners.compile=true")
ONE_SHARD = ("rollout.shards=1", "rollout.num_envs=128")
TRAINING = "stages: {train: {type: pretrain, env_steps: 100G, validate_every: 1000000}}\n"


@dataclass(frozen=True)
class Variant:
    """A variant of a row: overrides of settings, and whether tables are written."""

    settings: tuple[str, ...] = ()
    write_rows: bool = True


@dataclass(frozen=True)
class Row:
    """A config that is measured in several variants.

    Attributes:
        title: the name in the table.
        text: the config, in YAML.
        variants: variants by name; their runs alternate.
        measure: name of the function of `measures`.
        seconds: default duration of a run.
        target: mean return of training, and the number of newest episodes it is over.
        limit: maximum seconds of a run that has not reached its target.
        memory_at: updates at which memory is measured.
    """

    title: str
    text: str
    variants: dict[str, Variant] = field(default_factory=dict)
    measure: str = "training"
    seconds: float = 20.0
    target: tuple[float, int] | None = None
    limit: float = 0.0
    memory_at: tuple[int, ...] = ()


def workers(*numbers: int, shards: bool = False) -> dict[str, Variant]:
    """Returns a variant for each number of workers; with `shards`, as many shards as workers."""
    return {
        f"{n} workers" if n else "0 workers, no Ray": Variant(
            (f"workers.num={n}", *([f"rollout.shards={n}"] if shards else []))
        )
        for n in numbers
    }


CARTPOLE = """
name: throughput
tasks: cartpole
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [64, 64]}}
algorithm: {type: ppo, num_steps: 128, epochs: 4, minibatches: 4, lr: 1e-3, entropy_coef: 0.01}
rollout: {shards: 2, num_envs: 64}
"""

BANDIT_N10 = """
name: throughput
tasks: {type: bandit, arms: 5, pulls: 10}
network: {type: actor_critic, encoder: {type: lstm, hidden_size: 128}}
algorithm: {type: rl2, epochs: 4, minibatches: 4}
rollout: {shards: 2, num_envs: 512}
"""

BANDIT_N100 = """
name: throughput
tasks: {type: bandit, arms: 5, pulls: 100}
network: {type: actor_critic, encoder: {type: lstm, hidden_size: 128}}
algorithm: {type: rl2, gae_lambda: 0.3, lr: 2e-3, entropy_coef: 0, epochs: 4, minibatches: 8}
rollout: {shards: 2, num_envs: 256}
"""

POINT_GOAL = """
name: throughput
tasks: {type: point_goal, horizon: 100}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [64, 64]}}
algorithm: {type: maml, episodes_per_task: 20, inner_steps: 1, first_order: false}
rollout: {shards: 2, num_envs: 400}
"""

BUSY = """
name: throughput
tasks: {type: "benchmarks.busy:Busy", step_ms: 1.0}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [64, 64]}}
algorithm: {type: impala, num_steps: 16}
rollout: {num_envs: 32}
stages:
  train: {type: pretrain, max_policy_lag: 1, env_steps: 100G, validate_every: 1000000}
"""

START = """
name: throughput
tasks: cartpole
algorithm: ppo
stages: {train: {type: pretrain, env_steps: 1, validation_tasks: 1}}
"""

TINY = """
name: throughput
tasks: {type: bandit, arms: 2, pulls: 2}
network: {type: actor_critic, encoder: {type: mlp, hidden_sizes: [8]}}
algorithm: {type: ppo, num_steps: 2, epochs: 1, minibatches: 1}
rollout: {shards: 1, num_envs: 4}
"""

ROWS: dict[str, Row] = {
    "cartpole": Row(
        "CartPole-v1, PPO, MLP 64x64, 4 epochs, 128 envs",
        CARTPOLE + TRAINING,
        workers(0, 2)
        | {
            "compiled": Variant((*COMPILED, *ONE_SHARD)),
            "compiled, bfloat16": Variant((*COMPILED, *ONE_SHARD, BFLOAT16)),
            "compiled, bfloat16, 64 steps": Variant(
                (*COMPILED, *ONE_SHARD, BFLOAT16, "algorithm.num_steps=64")
            ),
        },
        target=(475.0, 100),
        limit=60,
    ),
    "bandit_n10": Row(
        "bandit k=5 n=10, RL2, LSTM 128, 4 epochs, 1024 envs",
        BANDIT_N10 + TRAINING,
        workers(0, 2)
        | {
            "0 workers, bfloat16, 4 threads, 2048 envs": Variant(
                (
                    *("workers.num=0", "rollout.shards=1", "rollout.num_envs=2048"),
                    *(BFLOAT16, "learners.threads=4"),
                )
            ),
            "0 workers, symmetric": Variant(("workers.num=0", SYMMETRIC, "algorithm.lr=2e-3")),
        },
        target=(6.6, 2000),
        limit=120,
    ),
    "bandit_n100": Row(
        "bandit k=5 n=100, RL2, LSTM 128, 4 epochs, 512 envs",
        BANDIT_N100 + TRAINING,
        workers(2)
        | {"0 workers, symmetric": Variant(("workers.num=0", SYMMETRIC, *SHORT_SIGHTED))},
        seconds=60,
        target=(75.1, 2000),  # Thompson sampling
        limit=1200,
    ),
    "maml": Row(
        "point_goal, MAML, second order, one inner step, 40 tasks of 20 episodes of 100 steps",
        POINT_GOAL + TRAINING,
        workers(0, 2)
        | {
            "compiled, 4 threads": Variant((*COMPILED, "learners.threads=4")),
            "one outer step, compiled, 4 threads, 4 workers": Variant(
                (
                    *(*COMPILED, "learners.threads=4", "workers.num=4"),
                    *("rollout.shards=4", "rollout.num_envs=200"),
                    *("algorithm.epochs=1", "algorithm.lr=3e-3"),
                )
            ),
        },
        target=(-30.0, 1600),  # over episodes before and after the inner step: -40 and -20
        limit=60,
    ),
    "busy": Row(
        "steps of 1 ms CPU, IMPALA, MLP 64x64, 32 envs a worker, learner overlapped",
        BUSY,
        workers(1, 2, 3, shards=True),
        measure="expensive",
    ),
    "start": Row(
        "from the typed command to the first update (files in the page cache)",
        START,
        workers(0, 2),
        measure="start",
    ),
    "worker_memory": Row(
        "memory of a rollout worker, CartPole-v1 as above",
        CARTPOLE + TRAINING,
        workers(2),
        measure="worker_memory",
        seconds=10,
    ),
    "driver_memory": Row(
        "memory of the driver over 10,000 updates of a tiny job",
        TINY + TRAINING,
        workers(0, 1),
        measure="driver_memory",
        memory_at=(1_000, 10_000),
    ),
    "tables": Row(
        "what writing tables costs, CartPole-v1 as above in one process",
        CARTPOLE + TRAINING,
        {
            "no rows": Variant(("workers.num=0",), write_rows=False),
            "tables": Variant(("workers.num=0",)),
            "tables and every step": Variant(("workers.num=0", "stages.train.record=true")),
        },
        measure="speed_alone",
        seconds=60,  # several commits
    ),
}
