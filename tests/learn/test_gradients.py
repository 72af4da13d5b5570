"""Compiled gradients are those of autograd, whatever has changed since they were compiled."""

import shutil

import numpy as np
import pytest
import torch

from dmrl_ray.config.schema import Component, RolloutSettings
from dmrl_ray.errors import ConfigError, NumericalError
from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import JobSpec, Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.learn.gradients import Compiled, by_autograd
from tests.algorithms.adaptation_cases import make_algorithm, one_trial, own_loss

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="takes a C++ compiler")

CARTPOLE = {"num_steps": 16, "epochs": 2, "minibatches": 2, "entropy_coef": 0.1}


def make_spec(encoder=None, algorithm=None, tasks="cartpole", **options):
    network = {"type": "actor_critic", "encoder": encoder or {"type": "mlp", "hidden_sizes": [16]}}
    parts = (tasks, network, algorithm or {"type": "ppo", **CARTPOLE, "anneal_entropy": True})
    parts = (Component.model_validate(part) for part in parts)
    return JobSpec("s", "s", 0, *parts, RolloutSettings(shards=1, num_envs=8), **options)


def trained(spec, updates):
    """Weights and metrics after some updates, the budget half spent after the first."""
    learner, worker, state = Learner(spec), RolloutWorker(), {}
    for i in range(updates):
        weights = Weights(i, learner.weights())
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
        metrics = learner.update(i, i * spec.env_steps // 2, [trial])
    return learner.weights(), metrics


@compiler
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_updates_by_compiled_code_are_those_of_autograd(precision):
    # Norms, weights and the annealed entropy bonus change from update to update.
    plain, compiled = (
        trained(make_spec(env_steps=1000, precision=precision, compile=on), updates=3)
        for on in (False, True)
    )
    for name, expected in plain[0].items():
        close = 1e-4 if precision == "float32" else 2e-2
        np.testing.assert_allclose(compiled[0][name], expected, rtol=close, atol=close)
    assert compiled[1].keys() == plain[1].keys() | {"time/compile_s"}
    assert compiled[1]["time/compile_s"] == 0  # in the third update, but not in the first
    assert compiled[1]["entropy"] == pytest.approx(plain[1]["entropy"], rel=1e-2)


@compiler
def test_a_learner_that_compiles_again_goes_on_to_the_same_bits():
    spec = make_spec(env_steps=1000, compile=True)
    straight, worker, state = Learner(spec), RolloutWorker(), {}
    resumed = Learner(spec)
    for i in range(2):
        weights = Weights(i, straight.weights())
        _, trial, state = worker.collect(CollectCall(spec, 0, i, 0), weights, state)
        if i == 1:
            resumed.set_state(straight.get_state())
            resumed.update(i, 0, [trial])
        straight.update(i, 0, [trial])
    for name, expected in straight.weights().items():
        np.testing.assert_array_equal(resumed.weights()[name], expected)


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["maml", "cavia", "meta_sgd"])
def test_second_derivatives_are_compiled_too(kind):
    algorithm = make_algorithm(kind, context=3 if kind == "cavia" else 0)
    trial = one_trial(algorithm)
    compiled = Compiled(algorithm.policy)
    moving = algorithm._moving(algorithm.outer_parts)
    for shift in (0.0, 0.1):
        with torch.no_grad():
            for parameter in algorithm.policy.parameters():
                parameter += shift * torch.randn_like(parameter)
        loss, batch, _ = own_loss(algorithm, trial)
        expected, _ = by_autograd(moving, loss, batch)
        found, report = compiled(moving, loss, batch)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert report["outer_loss"] == pytest.approx(loss(batch)[0].item(), abs=1e-4)


@compiler
def test_a_compiled_gradient_that_is_off_is_found(monkeypatch):
    def broken(self, *arguments):
        return lambda *tensors: [torch.zeros(2), torch.zeros(())]

    monkeypatch.setattr(Compiled, "_compile", broken)
    policy = Learner(make_spec()).policy
    weight = torch.nn.Parameter(torch.ones(2))
    loss = lambda batch: ((weight * batch["x"]).sum(), {"loss": torch.zeros(())})  # noqa: E731
    with pytest.raises(NumericalError, match=r"compiled gradient is off by 5 of 5; use false"):
        Compiled(policy)({"w": weight}, loss, {"x": torch.tensor([3.0, 4.0])})


def test_a_compiler_that_fails_is_told_in_one_sentence(monkeypatch):
    def fails(graph, tensors):
        raise RuntimeError("no g++\nand more")

    monkeypatch.setattr("torch._inductor.compile", fails)
    with pytest.raises(
        ConfigError, match=r"learners\.compile: .*RuntimeError: no g\+\+\); .*use false"
    ):
        trained(make_spec(compile=True), updates=1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (dict(encoder={"type": "lstm", "hidden_size": 8}), "with memory, dropout or batch norm"),
        (dict(encoder={"type": "mlp", "dropout": 0.1}), "with memory, dropout or batch norm"),
        (
            dict(algorithm={"type": "promp", "episodes_per_task": 4}, tasks={"type": "point_goal"}),
            r"the losses of promp cannot be compiled",
        ),
    ],
    ids=["memory", "dropout", "promp"],
)
def test_what_cannot_be_compiled_is_refused(change, found):
    with pytest.raises(ConfigError, match=r"learners\.compile: .*" + found):
        Learner(make_spec(compile=True, **change))
