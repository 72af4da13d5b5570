"""Steps per second of on-device training: rollouts and updates, without tables.

    python -m benchmarks.device                                # on a GPU if there is one
    python -m benchmarks.device --tasks bandit --device cpu numpy --num-envs 1024

Prints one JSON line for each task, device and number of environments: ``sps`` environment steps
per second, including ``epochs`` epochs of learning; ``collect`` and ``update``, their fractions of
the time; ``compiled``, whether gradients are compiled; ``return``, the mean over episodes of the
last rollout; ``updates``, the number measured, after two of warm-up. The device ``numpy`` is the
code of rollout workers, with the learner on the CPU. Needs PyTorch, gymnasium, pydantic, PyYAML and
pyarrow; neither Ray nor an installation of this package.
"""

from __future__ import annotations

import argparse
import json
from time import perf_counter

import torch

from dmrl_ray.config.components import Component
from dmrl_ray.config.schema import RolloutSettings
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.messages import CollectCall
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import RolloutWorker

LSTM = {"type": "lstm", "hidden_size": 128}
RL2 = {"type": "rl2", "epochs": 4, "minibatches": 4}
PPO = {"type": "ppo", "num_steps": 100, "epochs": 4, "minibatches": 4}
TASKS = {
    "bandit": ({"type": "bandit", "arms": 5, "pulls": 10}, LSTM, RL2),
    "grid_nav": ({"type": "grid_nav"}, LSTM, RL2),
    "point_goal": ({"type": "point_goal"}, {"type": "mlp", "hidden_sizes": [64, 64]}, PPO),
}
WARM_UP = 2
"""Updates before the measurement starts."""


def measure(
    task: str, device: str, num_envs: int, seconds: float, *, compile: bool = False
) -> dict[str, object]:
    """Trains for some seconds and returns the figures."""
    family, encoder, algorithm = TASKS[task]
    parts = (family, {"type": "actor_critic", "encoder": encoder}, algorithm)
    on_device = None if device == "numpy" else device
    rollout = RolloutSettings.model_validate(
        {"shards": 1, "num_envs": num_envs, "device": on_device}
    )
    spec = JobSpec(
        "device",
        "device",
        0,
        *map(Component.model_validate, parts),
        rollout,
        env_steps=10**12,
        device=on_device or "cpu",
        compile=compile and encoder is not LSTM,
    )
    worker, learner = RolloutWorker(), Learner(spec)
    updates = steps = 0
    collect_s = update_s = 0.0
    state: dict[str, object] = {}
    while updates < WARM_UP + 1 or collect_s + update_s < seconds:
        if updates == WARM_UP:
            steps, collect_s, update_s = 0, 0.0, 0.0
        start = perf_counter()
        weights = Weights(updates, learner.weights())
        report, trial, state = worker.collect(CollectCall(spec, 0, updates, 0), weights, state)
        collected = perf_counter()
        learner.update(updates, 0, [trial])
        collect_s += collected - start
        update_s += perf_counter() - collected
        steps += report.env_steps
        updates += 1
    total = collect_s + update_s
    returns = report.episodes["return"]
    return {
        "task": task,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "num_envs": num_envs,
        "sps": round(steps / total),
        "collect": round(collect_s / total, 3),
        "update": round(update_s / total, 3),
        "epochs": algorithm["epochs"],
        "compiled": spec.compile,
        "updates": updates - WARM_UP,
        "return": round(float(returns.mean()), 3) if len(returns) else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", nargs="+", choices=["cuda", "cpu", "numpy"], default=[default])
    parser.add_argument("--num-envs", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument(
        "--compile", action="store_true", help="compile gradients of policies without memory"
    )
    options = parser.parse_args()
    for task in options.tasks:
        for num_envs in options.num_envs:
            for device in options.device:
                figures = measure(task, device, num_envs, options.seconds, compile=options.compile)
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
