"""Packed rollouts inside RLlib equal those of a run."""

import numpy as np
import pytest

from dmrl_ray.jobs.learner import Learner
from dmrl_ray.jobs.spec import Weights
from dmrl_ray.jobs.worker import CollectCall, RolloutWorker
from dmrl_ray.rllib.packed import PackedConfig

SETTINGS = {
    "tasks": {"type": "cartpole"},
    "network": {"type": "actor_critic", "encoder": {"type": "mlp", "hidden_sizes": [32]}},
    "algorithm": {"type": "ppo", "num_steps": 64, "lr": 3e-3},
    "rollout": {"shards": 2, "num_envs": 8},
}


def build(num_env_runners=0):
    config = PackedConfig().packed(**SETTINGS)
    config.debugging(seed=0, log_level="ERROR").env_runners(num_env_runners=num_env_runners)
    return config, config.build_algo()


def weights_of(algorithm):
    state = algorithm.learner_group.get_weights()["default_policy"]
    return {name.removeprefix("policy."): x for name, x in state.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_its_updates_are_ours(ray_instance):
    config, algorithm = build()
    spec = config.job_spec()
    worker, learner = RolloutWorker(), Learner(spec)
    assert_equal(weights_of(algorithm), learner.weights())
    states, steps = [{}, {}], 0
    for version in range(2):
        algorithm.train()
        trials = []
        for shard in range(2):
            call = CollectCall(spec, shard, version, steps)
            _, trial, states[shard] = worker.collect(
                call, Weights(version, learner.weights()), states[shard]
            )
            trials.append(trial)
        steps += 2 * 8 * 64
        learner.update(version, steps, trials)
        assert_equal(weights_of(algorithm), learner.weights())
    algorithm.stop()


def test_it_learns(ray_instance):
    _, algorithm = build()
    returns = [algorithm.train()["env_runners"]["episode_return_mean"] for _ in range(25)]
    algorithm.stop()
    assert returns[-1] > 2 * returns[0]


def test_it_resumes_from_a_checkpoint_exactly(ray_instance, tmp_path):
    _, algorithm = build()
    algorithm.train()
    path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    algorithm.train()
    _, again = build()
    again.restore_from_path(path)
    result = again.train()
    assert_equal(weights_of(again), weights_of(algorithm))
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] == 2 * 2 * 8 * 64
    algorithm.stop()
    again.stop()


@pytest.mark.slow
def test_env_runners_in_other_processes_change_nothing(ray_instance):
    trained = []
    for num_env_runners in (0, 2):
        _, algorithm = build(num_env_runners)
        algorithm.train()
        algorithm.train()
        trained.append(weights_of(algorithm))
        algorithm.stop()
    assert_equal(*trained)


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="algorithms"):
        PackedConfig().packed(**SETTINGS, algorithms={"type": "ppo"})
