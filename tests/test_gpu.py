"""The learner on a GPU: the same updates, resumed exactly. Skipped without CUDA."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dmrl_ray.config.loading import parse_config
from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.control import controller
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights, build
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.results.display import Display
from dmrl_ray.results.reading import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LSTM = {"type": "lstm", "hidden_size": 32}
CASES = {
    "ppo": ("cartpole", "mlp", {"num_steps": 32}),
    "recurrent ppo": ("cartpole", LSTM, {"num_steps": 32}),
    "rl2": ("bandit", LSTM, {}),
    "maml": ("point_goal", "mlp", {"episodes_per_task": 8}),
}


def make_spec(case: str, device: str) -> JobSpec:
    tasks, encoder, settings = CASES[case]
    return JobSpec(
        stage="train",
        name="train",
        seed=1,
        tasks=Component(type=tasks),
        network=Component(type="actor_critic", encoder=encoder),
        algorithm=Component(type=case.split()[-1], **settings),
        rollout=RolloutSettings(shards=1, num_envs=64),
        env_steps=10**6,
        device=device,
    )


def updated(case: str, device: str, *, compile: bool = False) -> dict[str, np.ndarray]:
    """Weights after two updates on trials that a CPU policy collected."""
    spec = replace(make_spec(case, device), compile=compile)
    learner, worker = Learner(spec), RolloutWorker()
    first = Weights(0, Learner(make_spec(case, "cpu")).weights())
    _, trial, _ = worker.collect(CollectCall(spec, 0, 0, 0), first, {})
    for version in range(2):
        learner.update(version, 0, [trial])
    return learner.weights()


@pytest.mark.parametrize("case", CASES)
def test_the_gpu_learns_what_the_cpu_learns(case):
    cpu, gpu = updated(case, "cpu"), updated(case, "cuda")
    for name, array in cpu.items():
        np.testing.assert_allclose(gpu[name], array, rtol=2e-2, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("case", ["ppo", "maml"])
def test_compiled_code_learns_what_autograd_does(case):
    plain, compiled = (updated(case, "cuda", compile=on) for on in (False, True))
    for name, array in plain.items():
        np.testing.assert_allclose(compiled[name], array, rtol=2e-2, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_same_update_twice_gives_the_same_bits(case):
    first, second = updated(case, "cuda"), updated(case, "cuda")
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_learner_goes_on_exactly(case):
    spec = make_spec(case, "cuda")
    worker, straight = RolloutWorker(), Learner(make_spec(case, "cuda"))
    _, trial, _ = worker.collect(CollectCall(spec, 0, 0, 0), Weights(0, straight.weights()), {})
    straight.update(0, 0, [trial])
    resumed = Learner(spec)
    resumed.set_state(straight.get_state())
    straight.update(1, 0, [trial])
    resumed.update(1, 0, [trial])
    for name, array in straight.weights().items():
        np.testing.assert_array_equal(resumed.weights()[name], array, err_msg=name)


RESIDENT = {"ppo": {"type": "point_goal", "horizon": 20}, "rl2": "bandit", "maml": "point_goal"}


def device_spec(case: str) -> JobSpec:
    rollout = RolloutSettings(shards=1, num_envs=64, device="cuda")
    tasks = Component.model_validate(RESIDENT[case])
    return replace(make_spec(case, "cuda"), tasks=tasks, rollout=rollout)


@pytest.mark.parametrize("case", RESIDENT)
def test_what_stays_on_the_gpu_is_fixed_by_its_seed(case):
    results = []
    for _ in range(2):
        learner, worker, state = Learner(device_spec(case)), RolloutWorker(), {}
        for version in range(3):
            weights = Weights(version, learner.weights())
            call = CollectCall(learner.spec, 0, version, 0)
            _, trial, state = worker.collect(call, weights, state)
            assert trial[0].obs.is_cuda
            learner.update(version, 0, [trial])
        results.append(learner.weights())
    for name, array in results[0].items():
        np.testing.assert_array_equal(results[1][name], array, err_msg=name)


@pytest.mark.parametrize("case", RESIDENT)
def test_the_host_does_not_wait_while_the_gpu_acts(case):
    spec = device_spec(case)
    program = build(spec, "cuda")
    sampler = program.sampler(64)
    sampler.start(np.random.default_rng(0), 0)
    tasks = program.distribution.sample(np.random.default_rng(0), 64, "train")
    sampler.begin_trial(tasks, program.policy)
    act_on = sampler._act

    def strictly(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return act_on(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    sampler._act = strictly
    for _ in range(2):
        sampler.rollout(program.policy, program.distribution.max_episode_steps)


@pytest.mark.parametrize(
    "rollout",
    ["{shards: 2, num_envs: 512}", "{shards: 1, num_envs: 1024, device: cuda}"],
    ids=["on the host", "on the device"],
)
def test_a_whole_run_trains_on_the_gpu_without_ray(tmp_path, rollout):
    text = f"""
        tasks: {{type: bandit}}
        network: {{encoder: {{type: lstm, hidden_size: 64}}}}
        algorithm: {{type: rl2}}
        rollout: {rollout}
        workers: {{num: 0}}
        stages:
          meta: {{type: pretrain, env_steps: 500k, validate_every: 25, validation_tasks: 512}}
          held_out: {{type: evaluate, init_from: meta, tasks: 1024}}
    """
    folder = tmp_path / "run"
    controller.run(parse_config(text, "gpu"), folder, display=Display(quiet=True))
    frame = load(folder).query("stage == 'held_out'")
    assert frame["return"].mean() > 5.4  # 5.0 is chance, 6.66 optimal
