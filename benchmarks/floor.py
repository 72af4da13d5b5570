"""What a row of the table of speed costs at least on this machine: operations, bytes, environments.

    python -m benchmarks.floor

Measures, on one thread, the rate of matrix products (large, and of a row's own shapes), of an LSTM,
the bandwidth of memory and the rate of each environment; derives from these the CPU microseconds
that an environment step of each row must cost, which benchmarks/SPEED.md explains. Rates are of
CPU time, and the fastest of many short measurements count.
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
"""Bytes."""


@dataclass(frozen=True)
class Work:
    """Of one environment step, acting and learning together.

    Attributes:
        weights: multiplied with each input, one multiplication and addition each.
        operations: floating-point.
        bytes: moved to and from memory.
    """

    weights: int
    operations: float
    bytes: float


def work(spec: JobSpec) -> Work:
    """What an environment step of a job asks for, by counting.

    A pass forward is two operations a weight, a pass back four more. Bytes: the row of a rollout
    is written once, sent (read and written) once and read in each epoch; each epoch writes an
    activation and its gradient, and reads both.
    """
    program = build(spec)
    config = program.algorithm.config
    epochs: int = getattr(config, "epochs", 1)
    meta = program.algorithm.envs_per_task > 1
    weights, units = size(program.policy, critic=not meta)
    if not meta:
        operations = weights * (2 + 6 * epochs)
    else:
        # Two rollouts a trial, so half of the steps are support. Acting, and the worker's inner
        # step on the support; then in each epoch that step again, differentiated (three times the
        # cost of what is differentiated), and the outer step on the query.
        operations = weights * (2 + 6 // 2 + epochs * (3 * 6 + 6) // 2)
    family = program.distribution
    row = FLOAT * (
        np.prod(family.observation_space.shape or (1,)) + 8
    )  # and action, reward, targets, ...
    passes = 3 + epochs
    return Work(weights, operations, float(row * passes + FLOAT * units * 4 * epochs))


def size(policy: ActorCritic, *, critic: bool) -> tuple[int, int]:
    """Weights in matrix products, and the numbers that these products yield for one input."""
    matrices = [
        parameter
        for name, parameter in policy.named_parameters()
        if parameter.dim() == 2 and (critic or "value" not in name)
    ]
    return sum(m.numel() for m in matrices), sum(m.shape[0] for m in matrices)


def rate(call: Callable[[], object], seconds: float = 0.5) -> float:
    """Calls a second of CPU time of this thread: the fastest of many short measurements."""
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
    """Floating-point operations a second of a product of float32 matrices."""
    a, b = torch.randn(rows, inputs), torch.randn(inputs, outputs)
    out = torch.empty(rows, outputs)
    return 2 * rows * inputs * outputs * rate(lambda: torch.mm(a, b, out=out))


def other_matrix_rate(rows: int, inputs: int, outputs: int) -> float:
    """The same by the library that PyTorch's LSTM uses, which is not that of its linear layers."""
    a, b = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    product = torch.ops.mkldnn._linear_pointwise
    return 2 * rows * inputs * outputs * rate(lambda: product(a, b, None, "none", [], ""))


def lstm_rate(steps: int, columns: int, units: int, *, learn: bool) -> float:
    """Operations a second of an LSTM, one step forward or a whole sequence there and back."""
    net = nn.LSTM(units, units)
    x = torch.randn(steps if learn else 1, columns, units)
    weights = sum(p.numel() for p in net.parameters() if p.dim() == 2)

    def back() -> None:
        net(x)[0].sum().backward()

    with torch.set_grad_enabled(learn):
        calls = rate(back if learn else lambda: net(x))
    return calls * len(x) * columns * weights * (6 if learn else 2)


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes, of arrays that no cache holds."""
    a = np.zeros(32 << 20)
    b = np.ones_like(a)
    return 2 * a.nbytes * rate(lambda: np.copyto(a, b))


def env_s(family: TaskDistribution, columns: int) -> float:
    """Seconds of one step in one of many columns, random actions."""
    rng = np.random.default_rng(0)
    env = family.make_vec(columns)
    env.np_random = rng
    env.set_tasks(family.sample(rng, columns, "train"))
    env.reset()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(16)]
    turn = iter(range(10**9))
    return 1 / (columns * rate(lambda: env.step(actions[next(turn) % 16])))


def config_of(row: str) -> RunConfig:
    """The config of a row of the table."""
    return parse_config(ROWS[row].text, row, ["workers.num=0"])


def row_rate(row: str, spec: JobSpec, config: RunConfig) -> float:
    """Operations a second of a row's own shapes, where learning goes on in minibatches."""
    columns = config.rollout.shards * config.rollout.num_envs
    settings = spec.algorithm.settings
    parts = getattr(settings, "minibatches", 1)
    if "bandit" in row:
        bandit: Any = config.tasks.settings
        return lstm_rate(bandit.pulls, columns // parts, 128, learn=True)
    steps = getattr(settings, "num_steps", 100)
    return matrix_rate(steps * columns // parts, 64, 64)


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    product, moved = matrix_rate(2048, 2048, 2048), bandwidth()
    print(f"matrix products of 2048: {product / 1e9:.1f} GFLOP/s; copying: {moved / 1e9:.1f} GB/s")
    acting = lstm_rate(1, 512, 128, learn=False)
    print(f"LSTM 128, one step of 512 columns: {acting / 1e9:.1f} GFLOP/s")
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
