"""Lower bounds of the CPU time per step: floating-point operations, memory traffic, environments.

    python -m benchmarks.floor

Measures, on one thread, the rate of matrix products (large, and of a row's own shapes) and of an
LSTM, the memory bandwidth and the speed of each environment. From these it derives the least CPU
time of an environment step in each row of the table of speed, as explained in benchmarks/SPEED.md.
Rates are per CPU second, the highest of many short measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.machine import machine
from benchmarks.throughput.rows import ROWS
from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import RunConfig
from dmrl_ray.jobs.spec import JobSpec, build, job_spec
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.tasks.distribution import TaskDistribution

DERIVED = ("cartpole", "bandit_n10", "bandit_n100", "maml")
COLUMNS = (
    "row",
    "weights",
    "kFLOP a step",
    "bytes a step",
    "env µs",
    "own shapes GFLOP/s",
    "floor µs at the peak",
    "floor µs at own shapes",
)
FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Work:
    """The work of one environment step, acting and learning together.

    Attributes:
        weights: number of weights, each of which is one multiplication and addition per input.
        operations: floating-point operations.
        bytes: memory traffic.
    """

    weights: int
    operations: float
    bytes: float


def work(spec: JobSpec) -> Work:
    """Returns the work of an environment step of a job, by counting.

    A forward pass is two operations per weight, a backward pass four more. Bytes: a row of the
    rollout is written once, sent (read and written) once and read in each epoch; each epoch writes
    and reads activations and their gradients.
    """
    program = build(spec)
    config = program.algorithm.config
    epochs: int = getattr(config, "epochs", 1)
    meta = program.algorithm.envs_per_task > 1
    weights, units = size(program.policy, critic=not meta)
    if not meta:
        operations = weights * (2 + 6 * epochs)
    else:
        # A trial has two rollouts, so half of the steps are support: acting, and the worker's inner
        # step on the support; then in each epoch the inner step again, differentiated (three times
        # its cost), and the outer step on the query.
        operations = weights * (2 + 6 // 2 + epochs * (3 * 6 + 6) // 2)
    family = program.distribution
    row = FLOAT * (
        np.prod(family.observation_space.shape or (1,)) + 8
    )  # and action, reward, targets, ...
    passes = 3 + epochs
    return Work(weights, operations, float(row * passes + FLOAT * units * 4 * epochs))


def size(policy: ActorCritic, *, critic: bool) -> tuple[int, int]:
    """Returns the numbers of weights and of outputs of all matrix products."""
    matrices = [
        parameter
        for name, parameter in policy.named_parameters()
        if parameter.dim() == 2 and (critic or "value" not in name)
    ]
    return sum(m.numel() for m in matrices), sum(m.shape[0] for m in matrices)


def rate(call: Callable[[], object], seconds: float = 0.5) -> float:
    """Returns calls per CPU second of this thread, the highest of many short measurements."""
    call()
    start = time.thread_time()
    call()
    times = max(1, int(0.01 / (time.thread_time() - start)))
    found = []
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        start = time.thread_time()
        for _ in range(times):
            call()
        found.append(times / (time.thread_time() - start))
    return max(found)


def matrix_rate(rows: int, inputs: int, outputs: int) -> float:
    """Returns floating-point operations per second of a product of float32 matrices."""
    a, b = torch.randn(rows, inputs), torch.randn(inputs, outputs)
    out = torch.empty(rows, outputs)
    return 2 * rows * inputs * outputs * rate(lambda: torch.mm(a, b, out=out))


def other_matrix_rate(rows: int, inputs: int, outputs: int) -> float:
    """Returns the same for oneDNN, which PyTorch uses for LSTMs but not for linear layers."""
    a, b = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    product = torch.ops.mkldnn._linear_pointwise
    return 2 * rows * inputs * outputs * rate(lambda: product(a, b, None, "none", [], ""))


def lstm_rate(steps: int, num_envs: int, units: int, *, learn: bool) -> float:
    """Returns operations per second of an LSTM: one forward step or, to learn, backpropagation."""
    net = nn.LSTM(units, units)
    x = torch.randn(steps if learn else 1, num_envs, units)
    weights = sum(p.numel() for p in net.parameters() if p.dim() == 2)

    def forward_backward() -> None:
        net(x)[0].sum().backward()

    with torch.set_grad_enabled(learn):
        calls = rate(forward_backward if learn else lambda: net(x))
    return calls * len(x) * num_envs * weights * (6 if learn else 2)


def bandwidth() -> float:
    """Returns bytes per second that a copy reads and writes, of arrays larger than caches."""
    a = np.zeros(32 << 20)
    b = np.ones_like(a)
    return 2 * a.nbytes * rate(lambda: np.copyto(a, b))


def env_s(family: TaskDistribution, num_envs: int) -> float:
    """Returns seconds per environment step with random actions, of vectorised environments."""
    rng = np.random.default_rng(0)
    env = family.make_vec(num_envs)
    env.np_random = rng
    env.set_tasks(family.sample(rng, num_envs, "train"))
    env.reset()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(16)]
    turn = iter(range(10**9))
    return 1 / (num_envs * rate(lambda: env.step(actions[next(turn) % 16])))


def config_of(row: str) -> RunConfig:
    """Returns the config of a row of the table."""
    return parse_config(ROWS[row].text, row, ["workers.num=0"])


def row_rate(row: str, spec: JobSpec, config: RunConfig) -> float:
    """Returns operations per second of matrix products with the shapes of a row's minibatches."""
    num_envs = config.rollout.shards * config.rollout.num_envs
    settings = spec.algorithm.settings
    parts = getattr(settings, "minibatches", 1)
    if "bandit" in row:
        bandit: Any = config.tasks.settings
        return lstm_rate(bandit.pulls, num_envs // parts, 128, learn=True)
    steps = getattr(settings, "num_steps", 100)
    return matrix_rate(steps * num_envs // parts, 64, 64)


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    product, moved = matrix_rate(2048, 2048, 2048), bandwidth()
    print(f"matrix products of 2048: {product / 1e9:.1f} GFLOP/s; copying: {moved / 1e9:.1f} GB/s")
    acting = lstm_rate(1, 512, 128, learn=False)
    print(f"LSTM 128, one step of 512 environments: {acting / 1e9:.1f} GFLOP/s")
    other = other_matrix_rate(2048, 2048, 2048)
    print(f"matrix products by oneDNN: {other / 1e9:.1f} GFLOP/s")
    peak = max(product, other, acting)
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in DERIVED:
        config = config_of(row)
        spec = job_spec(config, "train")
        need, own = work(spec), row_rate(row, spec, config)
        env = env_s(build(spec).distribution, config.rollout.num_envs)
        rest = env + need.bytes / moved
        floors = [1e6 * (rest + need.operations / flops) for flops in (peak, own)]
        cells = [f"{need.weights:,}", f"{need.operations / 1e3:.0f}", f"{need.bytes:,.0f}"]
        cells += [f"{1e6 * env:.3f}", f"{own / 1e9:.1f}", *(f"{us:.2f}" for us in floors)]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
